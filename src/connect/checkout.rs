//! The checkout of a call: its permission to ask hyper-util's pool for a connection.
//!
//! Over HTTP/1 each call needs a connection for itself. A call acquires two *checkout permits*, one of its host and one
//! of the total, before it asks the pool. Their semaphores have the limits of the connections. Without them, the pool
//! would start a connect for each call, and continue connects whose calls got an idle connection.
//!
//! Over HTTP/2 calls share connections. The pool has one connection per host and lets one call open it. It fails all
//! calls that wait when that call is dropped, and it queues requests for which the connection has no stream. A call
//! therefore waits here until it has a [stream](super::streams) or is the next one to open a connection.
//!
//! For `https`, TLS negotiates the version of HTTP, so it is unknown before the first connection of a host. Calls then
//! acquire checkout permits, and one of them connects. The others wait until the [version](super::hosts::HostVersion)
//! is known, and for the connect timeout at most. Over HTTP/1 they then connect concurrently. Over HTTP/2 they release
//! their checkout permits and wait for a stream. If all of them connected before that, the pool would send them over
//! the first HTTP/2 connection, whether or not it has enough streams. A call that has been sent exchanges its permits
//! for a stream in [`Checkout::update`].

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
    conn::{Conn, ConnTag, HAS_CHECKOUT_PERMITS, HAS_STREAM},
    hosts::{HostRef, HttpVersion, QueueEntry},
    semaphore::PermitPair,
    state::ConnectState,
    streams::{Lane, Opening, Pick, StreamPermit, Streams},
};
use crate::time::WaitResult;
use crate::{origin::Origin, outcome::Rejected};

/// The permission to ask the pool for a connection.
pub(super) struct Checkout {
    grant: Grant,
    /// Keeps the entry of the host, so that the connection of this call has the same semaphores.
    host_ref: HostRef,
}

enum Grant {
    /// No permit. Over HTTP/2 the call takes a stream when it has a connection.
    Unpermitted,
    /// The right to open a connection that calls share.
    Open(Opening),
    /// A stream of a connection.
    Stream(StreamPermit),
    /// The checkout permits of the host and of the total, for a connection of its own.
    Permits(PermitPair),
    /// The checkout permits, and the right to open the first connection, whose version of HTTP is unknown.
    PermitsAndOpen(PermitPair, Opening),
}

/// The client and the properties of a call that needs a checkout.
#[derive(Clone, Copy)]
pub(super) struct CheckoutRequest {
    pub(super) client_id: u64,
    /// The version that the client uses for this call. `Unknown` if TLS negotiates it.
    pub(super) version: HttpVersion,
    /// The call may open an additional connection. Otherwise it waits for a stream of an open connection.
    pub(super) may_add: bool,
}

impl CheckoutRequest {
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

impl Checkout {
    /// Acquires the permission if that is possible without waiting.
    pub(super) fn try_acquire(
        shared: &Arc<ConnectState>,
        origin: Origin,
        request: CheckoutRequest,
    ) -> Result<Self, HostRef> {
        let host_ref = HostRef::register(shared, origin, request.client_id);
        let grant = match request.version(&host_ref.streams) {
            // Only a polled call may become the one that opens a connection: an unpolled one would block the others.
            HttpVersion::Unknown => None,
            HttpVersion::Http1 => try_permits(&host_ref).map(Grant::Permits),
            HttpVersion::Http2 => host_ref.streams.try_take().map(Grant::Stream),
        };
        match grant {
            Some(grant) => Ok(Self { grant, host_ref }),
            None => Err(host_ref),
        }
    }

    /// Waits for the permission.
    pub(super) async fn acquire(
        host_ref: HostRef,
        request: CheckoutRequest,
    ) -> Result<Self, Rejected> {
        let grant = loop {
            if request.version(&host_ref.streams) == HttpVersion::Http2 {
                break acquire_stream(&host_ref, request.may_add).await?;
            }
            if let Some(grant) = acquire_permits(&host_ref, request).await? {
                break grant;
            }
        };
        Ok(Self { grant, host_ref })
    }

    /// Returns whether the call is to open an additional connection, so that it may wait for a stream if that fails.
    pub(super) fn is_additional(&self) -> bool {
        matches!(&self.grant, Grant::Open(opening) if opening.is_additional())
    }

    /// Returns the lane over which the call is to be sent. `None` means the first lane.
    pub(super) fn lane(&self) -> Option<Lane> {
        match &self.grant {
            Grant::Open(opening) | Grant::PermitsAndOpen(_, opening) => Some(opening.lane()),
            Grant::Stream(permit) => permit.lane(),
            Grant::Unpermitted | Grant::Permits(..) => None,
        }
    }

    /// Adapts the permission to the connection of the call. Called with each poll until the response head.
    ///
    /// If it becomes known that calls to the host share connections, the call releases its checkout permits, and takes
    /// a stream of the connection to which it is assigned. The call that opens a connection takes its stream here.
    #[inline]
    pub(super) fn update(&mut self, connection: Option<&CaptureConnection>) {
        match &self.grant {
            Grant::Permits(..) if self.host_ref.streams.version.is_http2() => {}
            Grant::Open(_) | Grant::PermitsAndOpen(..) => {}
            // hyper-util's client sends the call over another connection, or has sent it before.
            Grant::Stream(permit) if permit.is_retired() => {}
            _ => return,
        }
        let tag = connection.and_then(ConnTag::of);
        // A call that waited for a stream also takes one of an HTTP/1 connection, to which the host may have changed.
        let has_stream = matches!(self.grant, Grant::Open(_) | Grant::Stream(_));
        let conn = tag.as_ref().map(|tag| &tag.conn);
        let conn = conn.filter(|conn| has_stream || conn.is_http2());
        match (conn, &self.grant) {
            // It has no connection yet.
            (None, Grant::Open(_) | Grant::PermitsAndOpen(..) | Grant::Stream(_))
                if tag.is_none() => {}
            (Some(conn), Grant::Stream(permit)) if permit.is_of(conn) => {}
            (None, _) => {
                self.grant = match std::mem::replace(&mut self.grant, Grant::Unpermitted) {
                    Grant::PermitsAndOpen(permits, _) => Grant::Permits(permits),
                    _ => Grant::Unpermitted,
                };
            }
            (Some(conn), _) => {
                let permit = StreamPermit::seize(conn);
                let grant = std::mem::replace(&mut self.grant, Grant::Stream(permit));
                if let Grant::Open(opening) | Grant::PermitsAndOpen(_, opening) = grant {
                    conn.store_opening(opening);
                }
            }
        }
    }

    /// Leaves the release of the permits or of the stream to the end of the call over this connection. Returns the
    /// value by which [`Conn`] releases them, for [`ConnTag::serve`].
    pub(super) fn transfer_to(self, conn: &Arc<Conn>) -> u64 {
        match self.grant {
            // `Conn` releases checkout permits to the semaphore of its own host. A `CONNECT` request names no scheme,
            // so its connection may belong to another host. Then the permits of the request are released here.
            Grant::Permits((own, total)) if Arc::ptr_eq(conn.host(), self.host_ref.host()) => {
                own.forget();
                total.forget();
                return HAS_CHECKOUT_PERMITS;
            }
            Grant::Stream(permit) if permit.is_of(conn) => {
                permit.forget();
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

fn try_permits(host_ref: &HostRef) -> Option<PermitPair> {
    host_ref
        .host()
        .checkout_permits
        .try_acquire()
        .zip(host_ref.shared.checkout_permits.try_acquire())
}

/// Waits for the checkout permits, and then until the version of HTTP is known. Returns `None` if calls to this host
/// share connections.
async fn acquire_permits(
    host_ref: &HostRef,
    request: CheckoutRequest,
) -> Result<Option<Grant>, Rejected> {
    let permits = match try_permits(host_ref) {
        Some(permits) => permits,
        None => match queue_for_permits(host_ref).await? {
            Some(permits) => permits,
            None => return Ok(None),
        },
    };
    Ok(match request.version(&host_ref.streams) {
        HttpVersion::Http2 => None,
        HttpVersion::Http1 => Some(Grant::Permits(permits)),
        HttpVersion::Unknown => open_first(host_ref, permits).await,
    })
}

/// Waits in the queue for the checkout permits. Returns `None` if it becomes known that calls to this host share
/// connections.
async fn queue_for_permits(host_ref: &HostRef) -> Result<Option<PermitPair>, Rejected> {
    let (shared, host, version) = (&*host_ref.shared, host_ref.host(), &host_ref.streams.version);
    let entry = QueueEntry::join(host_ref).ok_or_else(|| shared.reject())?;
    let permits = async {
        let mut is_http2 = pin!(version.wait_until(|version| version == HttpVersion::Http2));
        let mut permits = pin!(async {
            let own = host.checkout_permits.acquire().await;
            (own, shared.checkout_permits.acquire().await)
        });
        poll_fn(|cx| {
            if let Poll::Ready(permits) = permits.as_mut().poll(cx) {
                return Poll::Ready(Some(permits));
            }
            is_http2.as_mut().poll(cx).map(|()| None)
        })
        .await
    };
    let permits = timeout(shared.max_wait(), permits).await;
    entry.end(match &permits {
        Ok(Some(_)) => WaitResult::Admitted,
        // The call waits for a stream instead.
        Ok(None) => WaitResult::Abandoned,
        Err(_) => WaitResult::Rejected,
    });
    permits.map_err(|_| shared.reject())
}

/// Waits for the right to open the first connection, or until another call has opened it. Returns `None` if calls to
/// this host share connections.
///
/// The maximum wait is the connect timeout. Then the call connects, although another call connects too. The call has no
/// queue entry: over HTTP/1 its checkout permits would admit it.
async fn open_first(host_ref: &HostRef, permits: PermitPair) -> Option<Grant> {
    let (shared, streams) = (&*host_ref.shared, &host_ref.streams);
    let grant = {
        let mut is_known =
            pin!(streams.version.wait_until(|version| version != HttpVersion::Unknown));
        let mut opening = pin!(async {
            let _head = streams.head.acquire().await;
            loop {
                if let Some(opening) = streams.try_open() {
                    return opening;
                }
                streams.changed(host_ref, false).await;
            }
        });
        let grant = poll_fn(|cx| {
            if is_known.as_mut().poll(cx).is_ready() {
                return Poll::Ready(None);
            }
            opening.as_mut().poll(cx).map(Some)
        });
        timeout(shared.connect_timeout().unwrap_or(Duration::MAX), grant).await
    };
    match grant {
        Ok(Some(opening)) => Some(Grant::PermitsAndOpen(permits, opening)),
        Ok(None) if streams.version.is_http2() => None,
        Ok(None) | Err(_) => Some(Grant::Permits(permits)),
    }
}

/// Waits for a stream of a connection or for the right to open a connection.
///
/// While there is no connection, the maximum wait is the connect timeout. Then the call is sent without a permit. If
/// the host cannot be reached, all calls thus fail at this time, instead of one after the other.
async fn acquire_stream(host_ref: &HostRef, may_add: bool) -> Result<Grant, Rejected> {
    let (shared, streams) = (&*host_ref.shared, &host_ref.streams);
    if let Some(_head) = streams.head.try_acquire() {
        let mut permits = None;
        loop {
            match streams.pick(&mut permits, may_add) {
                Pick::Send(permit) => return Ok(Grant::Stream(permit)),
                Pick::Open(opening) => return Ok(Grant::Open(opening)),
                Pick::Wait { for_permits } => {
                    permits = if for_permits { shared.try_permits(host_ref.host()) } else { None };
                    if permits.is_none() {
                        break;
                    }
                }
            }
        }
    }
    let _queued = streams.queue(may_add);
    let mut is_up = streams.is_up();
    // Without a cap, a call that waits for the first connection needs no queue entry, so it is not rejected.
    let join = || QueueEntry::join(host_ref).ok_or_else(|| shared.reject());
    let entry = (is_up || shared.has_cap()).then(join).transpose()?;
    let waits_for_stream = AtomicBool::new(false);
    let count = || {
        if !waits_for_stream.swap(true, Relaxed) {
            shared.count_stream_wait();
        }
    };
    if is_up {
        count();
    }
    let mut grant = pin!(async {
        let mut head = streams.head.acquire().await;
        let mut permits = None;
        loop {
            match streams.pick(&mut permits, may_add) {
                Pick::Send(permit) => return Grant::Stream(permit),
                Pick::Open(opening) => return Grant::Open(opening),
                Pick::Wait { for_permits } => {
                    if streams.is_up() {
                        count();
                    }
                    drop(permits.take());
                    if !may_add && streams.may_any_add() {
                        drop(head);
                        head = streams.head.acquire().await;
                    } else {
                        permits = streams.changed(host_ref, for_permits).await;
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
        let grant_or_up = poll_fn(|cx| {
            if let Poll::Ready(grant) = grant.as_mut().poll(cx) {
                return Poll::Ready(Some(grant));
            }
            came_up.as_mut().poll(cx).map(|()| None)
        });
        let max = shared.connect_timeout().unwrap_or(Duration::MAX);
        let grant = match timeout(max, grant_or_up).await {
            Ok(Some(grant)) => grant,
            Err(_) if !streams.is_up() => Grant::Unpermitted,
            // The connection may have closed since.
            Ok(None) | Err(_) => {
                is_up = streams.is_up();
                continue;
            }
        };
        if let Some(entry) = entry {
            entry.end(WaitResult::Admitted);
        }
        return Ok(grant);
    }
    let entry = match entry {
        Some(entry) => entry,
        None => join()?,
    };
    let checkout = timeout(shared.max_wait(), grant).await;
    let result = if checkout.is_ok() { WaitResult::Admitted } else { WaitResult::Rejected };
    entry.end(result);
    checkout.map_err(|_| {
        count();
        shared.reject()
    })
}
