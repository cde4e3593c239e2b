//! A call's turn, where each call needs a connection for itself.
//!
//! Over HTTP/1 more calls than connections cannot be under way. Those that are too many wait here, before they ask
//! the pool: it would ask for a connection for each, and go on asking for those that get an idle one.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    sync::Arc,
    task::Poll,
};

use tokio::time::timeout;

use super::{
    core::Connections,
    gate::Place,
    host::{Guest, Host, Line},
};
use crate::call::{Origin, Rejected, Shared};

/// The right to ask for a connection.
pub(super) struct Turn {
    places: Option<(Place, Place)>,
    /// So that its connection is of the same entry in the book, and knows the same gates.
    guest: Guest,
}

impl Turn {
    /// Without waiting, if that can be.
    pub(super) fn now(all: &Shared<Connections>, origin: Origin) -> Result<Self, Guest> {
        let guest = Guest::register(all, origin);
        if guest.host.shares.known() {
            return Ok(Self { places: None, guest });
        }
        let places = guest.host.calls.try_enter().zip(all.calls.try_enter());
        if places.is_some() { Ok(Self { places, guest }) } else { Err(guest) }
    }

    /// In turn, or because calls to this host turn out to need none.
    pub(super) async fn next(guest: Guest) -> Result<Self, Rejected> {
        let (all, host) = (&*guest.all, &*guest.host);
        let line = Line::join(&guest).ok_or_else(|| all.refuse())?;
        let turn = async {
            let mut shares = pin!(host.shares.wait());
            let mut places = pin!(async {
                let own = host.calls.enter().await;
                (own, all.calls.enter().await)
            });
            poll_fn(|cx| {
                if let Poll::Ready(places) = places.as_mut().poll(cx) {
                    return Poll::Ready(Some(places));
                }
                shares.as_mut().poll(cx).map(|()| None)
            })
            .await
        };
        let turn = timeout(all.longest_wait(), turn).await;
        drop(line);
        match turn {
            Ok(places) => Ok(Self { places, guest }),
            Err(_) => Err(all.refuse()),
        }
    }

    /// Whether calls have turned out to share connections.
    pub(super) fn is_needless(&self) -> bool {
        self.guest.host.shares.known()
    }

    /// Leaves it to the end of the call to give it back, if there is anything to give.
    /// The end of a call over another host's connection gives nothing back: `CONNECT` requests name no scheme.
    pub(super) fn keep(self, host: &Arc<Host>) -> bool {
        if !Arc::ptr_eq(host, &self.guest.host) {
            return false;
        }
        let Some((own, of_all)) = self.places else { return false };
        own.keep();
        of_all.keep();
        true
    }
}
