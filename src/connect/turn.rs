//! A call's turn: where each call needs a connection for itself, and where the first call makes one for all.
//!
//! Over HTTP/1 more calls than connections cannot be under way. Those that are too many wait here, before they ask
//! the pool: it would ask for a connection for each, and go on asking for those that get an idle one.
//!
//! Over HTTP/2 the pool lets one call connect, and fails all that wait for it when that call is given up. They wait
//! here too, until there is a connection, or the next of them is to make it.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use hyper_util::client::legacy::connect::CaptureConnection;
use tokio::time::timeout;

use super::{
    conn::Tag,
    core::Connections,
    gate::Place,
    host::{Guest, Host, Line},
};
use crate::call::{Origin, Rejected, Shared};

/// The right to ask for a connection.
pub(super) struct Turn {
    right: Right,
    /// So that its connection is of the same entry in the book, and knows the same gates.
    guest: Guest,
}

enum Right {
    /// There is one to share.
    Free,
    /// To make one that others are going to share.
    First { _given_back: Place },
    /// To one of its own, until it turns out that they are shared.
    Own(Place, Place),
}

impl Turn {
    /// Without waiting, if that can be. `shares`: these calls share connections, also if it is not known of their
    /// host yet.
    pub(super) fn now(
        all: &Shared<Connections>,
        origin: Origin,
        shares: bool,
    ) -> Result<Self, Guest> {
        let guest = Guest::register(all, origin);
        let host = &guest.host;
        let right = if shares || host.shares.known() {
            // Who is to be the first is asked once the call is polled: one that is not makes no connection.
            host.shares.is_up().then_some(Right::Free)
        } else {
            let places = host.calls.try_enter().zip(all.calls.try_enter());
            places.map(|(own, of_all)| Right::Own(own, of_all))
        };
        match right {
            Some(right) => Ok(Self { right, guest }),
            None => Err(guest),
        }
    }

    /// In turn.
    pub(super) async fn next(guest: Guest, shares: bool) -> Result<Self, Rejected> {
        let own = if shares || guest.host.shares.known() { None } else { own(&guest).await? };
        let right = match own {
            Some((own, of_all)) => Right::Own(own, of_all),
            None => first(&guest).await?,
        };
        Ok(Self { right, guest })
    }

    /// Asked while its call waits for a connection, and once it has one.
    #[inline]
    pub(super) fn watch(&mut self, connection: Option<&CaptureConnection>) {
        let shares = &self.guest.host.shares;
        match &self.right {
            Right::Own(..) if shares.known() => {}
            Right::First { .. } => {
                let Some(tag) = connection.and_then(Tag::of) else { return };
                shares.set_up(true);
                // Looked at after: who ends it says so after.
                if tag.conn.why_over().is_some() {
                    shares.set_up(false);
                }
            }
            _ => return,
        }
        self.right = Right::Free;
    }

    /// Leaves it to the end of the call to give it back, if there is anything to give.
    /// The end of a call over another host's connection gives nothing back: `CONNECT` requests name no scheme.
    pub(super) fn keep(self, host: &Arc<Host>) -> bool {
        if !Arc::ptr_eq(host, &self.guest.host) {
            return false;
        }
        let Right::Own(own, of_all) = self.right else { return false };
        own.keep();
        of_all.keep();
        true
    }
}

/// None: calls to this host turn out to share connections.
async fn own(guest: &Guest) -> Result<Option<(Place, Place)>, Rejected> {
    let (all, host) = (&*guest.all, &*guest.host);
    let line = Line::join(guest).ok_or_else(|| all.refuse())?;
    let turn = async {
        let mut shares = pin!(host.shares.wait_until_known());
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
    turn.map_err(|_| all.refuse())
}

/// Once there is a connection to share, or whoever was making it has gone. Not for longer than it may take to make
/// one: where it cannot be made all are to hear of it, and not each only after those before.
async fn first(guest: &Guest) -> Result<Right, Rejected> {
    let (all, host) = (&*guest.all, &*guest.host);
    let place = match host.first.try_enter() {
        Some(place) => place,
        None => {
            // Without a cap nobody is refused.
            let joined = all.has_cap().then(|| Line::join(guest).ok_or_else(|| all.refuse()));
            let _line = joined.transpose()?;
            let longest = all.connect_timeout().unwrap_or(Duration::MAX);
            match timeout(longest, host.first.enter()).await {
                Ok(place) => place,
                Err(_) => return Ok(Right::Free),
            }
        }
    };
    Ok(if host.shares.is_up() { Right::Free } else { Right::First { _given_back: place } })
}
