//! The permission of a call to ask hyper-util's pool for a connection.
//!
//! Over HTTP/1 each call needs a connection for itself. A call acquires two *checkout permits*, one of its host and one
//! of the total, before it asks the pool. Their gates have the limits of the connections. Without them, the pool would
//! start a connect for each call, and continue connects whose calls got an idle connection.
//!
//! Over HTTP/2 calls share connections. The pool has one connection per host and lets one call open it. It fails all
//! calls that wait when that call is dropped, and it queues requests for which the connection has no stream. A call
//! therefore waits here until it has a [stream](super::streams) or is the next one to open a connection.
//!
//! For `https`, TLS negotiates the version of HTTP, so it is unknown before the first connection of a host. Calls then
//! acquire checkout permits, and one of them connects. The others wait until the [version](super::hosts::HostVersion) is
//! known, and for the connect timeout at most. Over HTTP/1 they then connect concurrently. Over HTTP/2 they release
//! their checkout permits and wait for a stream. If all of them connected before that, the pool would send them over
//! the first HTTP/2 connection, whether or not it has enough streams. A call that has been sent exchanges its permits
//! for a stream in [`Turn::watch`].

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
    connections::Connections,
    hosts::{Guest, HttpVersion, Line},
    semaphore::Place,
    streams::{Lane, Opening, Pick, StreamPermit, Streams},
};
use crate::{origin::Origin, outcome::Rejected};

/// The permission to ask the pool for a connection.
pub(super) struct Turn {
    right: Right,
    /// Keeps the host in the book, so that the connection of this call has the same gates.
    guest: Guest,
}

enum Right {
    /// No permit. Over HTTP/2 the call takes a stream when it has a connection.
    Free,
    /// The right to open a connection that calls share.
    First(Opening),
    /// A stream of a connection.
    Stream(StreamPermit),
    /// The checkout permits of the host and of the total, for a connection of its own.
    Own(Place, Place),
    /// The checkout permits, and the right to open the first connection, whose version of HTTP is unknown.
    FirstOwn(Place, Place, Opening),
}

/// The client that makes a call.
#[derive(Clone, Copy)]
pub(super) struct Caller {
    pub(super) owner: u64,
    /// The version that the client uses for this call. `Unknown` if TLS negotiates it.
    pub(super) version: HttpVersion,
    /// The call may open an additional connection. Otherwise it waits for a stream of those that there are.
    pub(super) may_add: bool,
}

impl Caller {
    /// Returns the version of HTTP for this call. The settings of hyper-util's builder may make an `http` client use
    /// HTTP/2, so the version of a connection takes precedence.
    fn version(self, streams: &Streams) -> HttpVersion {
        match streams.version.get() {
            HttpVersion::Http2 => HttpVersion::Http2,
            known if self.version == HttpVersion::Unknown => known,
            _ => self.version,
        }
    }
}

impl Turn {
    /// Acquires the permission if that is possible without waiting.
    pub(super) fn now(
        all: &Arc<Connections>,
        origin: Origin,
        caller: Caller,
    ) -> Result<Self, Guest> {
        let guest = Guest::register(all, origin, caller.owner);
        let right = match caller.version(&guest.streams) {
            // Only a polled call may become the one that opens a connection: an unpolled one would block the others.
            HttpVersion::Unknown => None,
            HttpVersion::Http1 => try_places(&guest).map(|(own, of_all)| Right::Own(own, of_all)),
            HttpVersion::Http2 => guest.streams.try_take().map(Right::Stream),
        };
        match right {
            Some(right) => Ok(Self { right, guest }),
            None => Err(guest),
        }
    }

    /// Waits for the permission.
    pub(super) async fn next(guest: Guest, caller: Caller) -> Result<Self, Rejected> {
        let right = loop {
            if caller.version(&guest.streams) == HttpVersion::Http2 {
                break shared(&guest, caller.may_add).await?;
            }
            if let Some(right) = own(&guest, caller).await? {
                break right;
            }
        };
        Ok(Self { right, guest })
    }

    /// Returns whether the call is to open an additional connection, so that it may wait for a stream if that fails.
    pub(super) fn is_additional(&self) -> bool {
        matches!(&self.right, Right::First(opening) if opening.is_additional())
    }

    /// Returns the lane over which the call is to be sent. `None` means the first lane.
    pub(super) fn lane(&self) -> Option<Lane> {
        match &self.right {
            Right::First(opening) | Right::FirstOwn(_, _, opening) => Some(opening.lane()),
            Right::Stream(permit) => permit.lane(),
            Right::Free | Right::Own(..) => None,
        }
    }

    /// Adapts the permission to the connection of the call. Called with each poll until the response head.
    ///
    /// If it becomes known that calls to the host share connections, the call releases its checkout permits, and takes
    /// a stream of the connection to which it is assigned. The call that opens a connection takes its stream here.
    #[inline]
    pub(super) fn watch(&mut self, connection: Option<&CaptureConnection>) {
        match &self.right {
            Right::Own(..) if self.guest.streams.version.is_http2() => {}
            Right::First(_) | Right::FirstOwn(..) => {}
            // hyper-util's client sends the call over another connection, or has sent it before.
            Right::Stream(permit) if permit.is_left() => {}
            _ => return,
        }
        let tag = connection.and_then(Tag::of);
        // A call that waited for a stream also takes one of an HTTP/1 connection, to which the host may have changed.
        let has_stream = matches!(self.right, Right::First(_) | Right::Stream(_));
        let conn = tag.as_ref().map(|tag| &tag.conn);
        let conn = conn.filter(|conn| has_stream || conn.is_http2());
        match (conn, &self.right) {
            // It has no connection yet.
            (None, Right::First(_) | Right::FirstOwn(..) | Right::Stream(_)) if tag.is_none() => {}
            (Some(conn), Right::Stream(permit)) if permit.is_of(conn) => {}
            (None, _) => {
                self.right = match std::mem::replace(&mut self.right, Right::Free) {
                    Right::FirstOwn(own, of_all, _) => Right::Own(own, of_all),
                    _ => Right::Free,
                };
            }
            (Some(conn), _) => {
                let permit = StreamPermit::seize(conn);
                let right = std::mem::replace(&mut self.right, Right::Stream(permit));
                if let Right::First(opening) | Right::FirstOwn(_, _, opening) = right {
                    conn.hold(opening);
                }
            }
        }
    }

    /// Leaves the release of the permits or of the stream to the end of the call over this connection. Returns the tag
    /// by which [`Conn`] releases them.
    pub(super) fn keep(self, conn: &Arc<Conn>) -> u64 {
        match self.right {
            // `Conn` releases checkout permits to the gate of its own host. A `CONNECT` request names no scheme, so its
            // connection may belong to another host. Then the permits of the request are released here.
            Right::Own(own, of_all) if Arc::ptr_eq(conn.host(), self.guest.host()) => {
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

fn try_places(guest: &Guest) -> Option<(Place, Place)> {
    guest.host().calls.try_enter().zip(guest.all.calls.try_enter())
}

/// Waits for the checkout permits, and then until the version of HTTP is known. Returns `None` if calls to this host
/// share connections.
async fn own(guest: &Guest, caller: Caller) -> Result<Option<Right>, Rejected> {
    let places = match try_places(guest) {
        Some(places) => places,
        None => match places(guest).await? {
            Some(places) => places,
            None => return Ok(None),
        },
    };
    Ok(match caller.version(&guest.streams) {
        HttpVersion::Http2 => None,
        HttpVersion::Http1 => Some(Right::Own(places.0, places.1)),
        HttpVersion::Unknown => first_own(guest, places).await,
    })
}

/// Waits in the queue for the checkout permits. Returns `None` if it becomes known that calls to this host share
/// connections.
async fn places(guest: &Guest) -> Result<Option<(Place, Place)>, Rejected> {
    let (all, host, version) = (&*guest.all, guest.host(), &guest.streams.version);
    let line = Line::join(guest).ok_or_else(|| all.refuse())?;
    let places = async {
        let mut is_http2 = pin!(version.wait_until(|version| version == HttpVersion::Http2));
        let mut places = pin!(async {
            let own = host.calls.enter().await;
            (own, all.calls.enter().await)
        });
        poll_fn(|cx| {
            if let Poll::Ready(places) = places.as_mut().poll(cx) {
                return Poll::Ready(Some(places));
            }
            is_http2.as_mut().poll(cx).map(|()| None)
        })
        .await
    };
    let places = timeout(all.longest_wait(), places).await;
    drop(line);
    places.map_err(|_| all.refuse())
}

/// Waits for the right to open the first connection, or until another call has opened it. Returns `None` if calls to
/// this host share connections.
///
/// The maximum wait is the connect timeout. Then the call connects, although another call connects too. The call has no
/// queue entry: over HTTP/1 its checkout permits would admit it.
async fn first_own(guest: &Guest, places: (Place, Place)) -> Option<Right> {
    let (all, streams) = (&*guest.all, &guest.streams);
    let right = {
        let mut is_known =
            pin!(streams.version.wait_until(|version| version != HttpVersion::Unknown));
        let mut opening = pin!(async {
            let _head = streams.head.enter().await;
            loop {
                if let Some(opening) = streams.try_open() {
                    return opening;
                }
                streams.changed(guest, false).await;
            }
        });
        let right = poll_fn(|cx| {
            if is_known.as_mut().poll(cx).is_ready() {
                return Poll::Ready(None);
            }
            opening.as_mut().poll(cx).map(Some)
        });
        timeout(all.connect_timeout().unwrap_or(Duration::MAX), right).await
    };
    match right {
        Ok(Some(opening)) => Some(Right::FirstOwn(places.0, places.1, opening)),
        Ok(None) if streams.version.is_http2() => None,
        Ok(None) | Err(_) => Some(Right::Own(places.0, places.1)),
    }
}

/// Waits for a stream of a connection or for the right to open a connection.
///
/// While there is no connection, the maximum wait is the connect timeout. Then the call is sent without a permit. If
/// the host cannot be reached, all calls thus fail at this time, instead of one after the other.
async fn shared(guest: &Guest, may_add: bool) -> Result<Right, Rejected> {
    let (all, streams) = (&*guest.all, &guest.streams);
    if let Some(_head) = streams.head.try_enter() {
        let mut room = None;
        loop {
            match streams.pick(&mut room, may_add) {
                Pick::Send(permit) => return Ok(Right::Stream(permit)),
                Pick::Open(opening) => return Ok(Right::First(opening)),
                Pick::Wait { for_room } => {
                    room = if for_room { all.try_room(guest.host()) } else { None };
                    if room.is_none() {
                        break;
                    }
                }
            }
        }
    }
    let _queued = streams.queue(may_add);
    let mut is_up = streams.is_up();
    // Without a cap, a call that waits for the first connection needs no queue entry, so it is not rejected.
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
        let mut head = streams.head.enter().await;
        let mut room = None;
        loop {
            match streams.pick(&mut room, may_add) {
                Pick::Send(permit) => return Right::Stream(permit),
                Pick::Open(opening) => return Right::First(opening),
                Pick::Wait { for_room } => {
                    if streams.is_up() {
                        count();
                    }
                    drop(room.take());
                    if !may_add && streams.may_any_add() {
                        drop(head);
                        head = streams.head.enter().await;
                    } else {
                        room = streams.changed(guest, for_room).await;
                    }
                }
            }
        }
    });
    while !is_up {
        let mut came_up = pin!(streams.came_up());
        // `came_up` receives notifications from its creation on, so check after it: a connection that comes up in
        // between is not missed.
        if streams.is_up() {
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
            Err(_) if !streams.is_up() => return Ok(Right::Free),
            // The connection may have closed since.
            Ok(None) | Err(_) => is_up = streams.is_up(),
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
