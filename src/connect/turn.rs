//! A call's turn: where each call needs a connection for itself, and where calls share the streams of connections.
//!
//! Over HTTP/1 more calls than connections cannot be under way. Those that are too many wait here, before they ask
//! the pool: it would ask for a connection for each, and go on asking for those that get an idle one.
//!
//! Over HTTP/2 the pool has one connection, lets one call connect, fails all that wait for it when that call is given up,
//! and queues requests for which the connection has no stream. Calls wait here too, until there is a [stream](super::streams),
//! or the next of them is to open a connection.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::Poll,
    time::Duration,
};

use hyper_util::client::legacy::connect::CaptureConnection;
use tokio::time::timeout;

use super::{
    conn::{Conn, HAS_STREAM, HAS_TURN, Tag},
    core::Connections,
    gate::Place,
    host::{Guest, Line},
    streams::{Lane, Opening, Pick, StreamPermit},
};
use crate::call::{Origin, Rejected, Shared};

/// The right to ask for a connection.
pub(super) struct Turn {
    right: Right,
    /// So that its connection is of the same entry in the book, and knows the same gates.
    guest: Guest,
}

enum Right {
    /// Without a claim: it is counted once it has a connection.
    Free,
    /// To open a connection that calls are going to share.
    First(Opening),
    /// To a stream of a connection.
    Stream(StreamPermit),
    /// To one of its own, until it turns out that they are shared.
    Own(Place, Place),
}

/// The client that makes a call.
#[derive(Clone, Copy)]
pub(super) struct Caller {
    pub(super) owner: u64,
    /// Its calls share connections, also if it is not known of their host yet.
    pub(super) shares: bool,
}

impl Turn {
    /// Without waiting, if that can be.
    pub(super) fn now(
        all: &Shared<Connections>,
        origin: Origin,
        caller: Caller,
    ) -> Result<Self, Guest> {
        let guest = Guest::register(all, origin);
        let host = &guest.host;
        let right = if caller.shares || host.shares.known() {
            // Whether it is to open a connection is decided once it is polled: an unpolled call makes none.
            host.streams.try_take(caller.owner).map(Right::Stream)
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
    pub(super) async fn next(guest: Guest, caller: Caller) -> Result<Self, Rejected> {
        let shares = caller.shares || guest.host.shares.known();
        let own = if shares { None } else { own(&guest).await? };
        let right = match own {
            Some((own, of_all)) => Right::Own(own, of_all),
            None => shared(&guest, caller.owner).await?,
        };
        Ok(Self { right, guest })
    }

    /// The lane that the call is to be sent over: without one, the first.
    pub(super) fn lane(&self) -> Option<Lane> {
        match &self.right {
            Right::First(opening) => Some(opening.lane()),
            Right::Stream(permit) => permit.lane(),
            Right::Free | Right::Own(..) => None,
        }
    }

    /// Asked while its call waits for a connection, and once it has one.
    #[inline]
    pub(super) fn watch(&mut self, connection: Option<&CaptureConnection>) {
        match &self.right {
            Right::Own(..) if self.guest.host.shares.known() => {}
            Right::First(_) => {}
            _ => return,
        }
        let tag = connection.and_then(Tag::of);
        let conn = tag.as_ref().map(|tag| &tag.conn).filter(|conn| conn.is_http2());
        match (conn, &self.right) {
            // It has no connection yet.
            (None, Right::First(_)) if tag.is_none() => {}
            (None, _) => self.right = Right::Free,
            (Some(conn), _) => {
                let permit = StreamPermit::seize(conn);
                let right = std::mem::replace(&mut self.right, Right::Stream(permit));
                if let Right::First(opening) = right {
                    conn.hold(opening);
                }
            }
        }
    }

    /// Leaves it to the end of the call over this connection to give it back, if there is anything to give. Returns the
    /// tag of the call.
    pub(super) fn keep(self, conn: &Shared<Conn>) -> u64 {
        match self.right {
            // The end of a call over another host's connection gives nothing back: `CONNECT` requests name no scheme.
            Right::Own(own, of_all) if Arc::ptr_eq(conn.host(), &self.guest.host) => {
                own.keep();
                of_all.keep();
                return HAS_TURN;
            }
            Right::Stream(permit) if permit.is_of(conn) => {
                permit.keep();
                return HAS_STREAM;
            }
            _ => {}
        }
        if !conn.is_http2() {
            return 0;
        }
        conn.seize_stream();
        HAS_STREAM
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

/// A stream of a connection, or the right to open one.
///
/// While there is no connection, a call waits no longer than it may take to make one, and is then sent without a claim:
/// where none can be made, all calls fail at that time, and not each one only after those before it.
async fn shared(guest: &Guest, owner: u64) -> Result<Right, Rejected> {
    let (all, streams) = (&*guest.all, &guest.host.streams);
    if let Some(_head) = guest.host.head.try_enter() {
        match streams.pick(all, &guest.host, owner) {
            Pick::Send(permit) => return Ok(Right::Stream(permit)),
            Pick::Open(opening) => return Ok(Right::First(opening)),
            Pick::Wait { .. } => {}
        }
    }
    let _queued = streams.queue();
    let mut is_up = streams.is_up(owner);
    // Without a cap no call is refused because it waits for the first connection.
    let join = || Line::join(guest).ok_or_else(|| all.refuse());
    let mut line = (is_up || all.has_cap()).then(join).transpose()?;
    let waits_for_stream = AtomicBool::new(false);
    let count = || {
        if !waits_for_stream.swap(true, Relaxed) {
            all.count_stream_wait();
        }
    };
    if is_up {
        count();
    }
    let mut right = pin!(async {
        let _head = guest.host.head.enter().await;
        loop {
            match streams.pick(all, &guest.host, owner) {
                Pick::Send(permit) => return Right::Stream(permit),
                Pick::Open(opening) => return Right::First(opening),
                Pick::Wait { for_room } => {
                    if streams.is_up(owner) {
                        count();
                    }
                    streams.changed(guest, for_room).await;
                }
            }
        }
    });
    while !is_up {
        let mut came_up = pin!(streams.came_up());
        // Looked at afterwards, so that a connection that comes up in between is not missed.
        if streams.is_up(owner) {
            break;
        }
        let right_or_up = poll_fn(|cx| {
            if let Poll::Ready(right) = right.as_mut().poll(cx) {
                return Poll::Ready(Some(right));
            }
            came_up.as_mut().poll(cx).map(|()| None)
        });
        let max = all.connect_timeout().unwrap_or(Duration::MAX);
        match timeout(max, right_or_up).await {
            Ok(Some(right)) => return Ok(right),
            Err(_) if !streams.is_up(owner) => return Ok(Right::Free),
            // It may be that of another client.
            Ok(None) | Err(_) => is_up = streams.is_up(owner),
        }
    }
    if line.is_none() {
        line = Some(join()?);
    }
    let turn = timeout(all.longest_wait(), right).await;
    drop(line);
    turn.map_err(|_| {
        count();
        all.refuse()
    })
}
