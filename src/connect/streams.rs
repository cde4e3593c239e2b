//! The HTTP/2 connections of a client to a host, and their streams.
//!
//! hyper-util's client shares one HTTP/2 connection per host. A request beyond the peer's
//! `SETTINGS_MAX_CONCURRENT_STREAMS` waits inside the connection, where no layer observes the wait. A
//! [`Client`](super::client::Client) therefore has several of hyper-util's clients, its *lanes*, with one HTTP/2
//! connection per host each. A call takes a stream permit of one connection, and is then sent over the lane of that
//! connection.
//!
//! A call that finds no free stream queues at [`Streams::head`], behind the calls of the same client to the same host.
//! Only the first call of the queue searches for a stream. [`Streams::notify`] wakes it after each change that may help
//! it: a released stream, a connection whose SETTINGS arrived, a connection that is to be closed or has closed, a
//! connect that ended. `Notify` stores one wake-up, so a change between a search and the wait is not lost. A call that
//! arrives takes a stream directly only while no call is queued, so it does not overtake.
//!
//! If the connect of an additional connection fails, its call queues again, and only waits for a stream. At the head of
//! the queue it passes the head to a call that may still open a connection, if there is one.
//!
//! A stream permit belongs to a connection and is released at the end of the response body. If the connection closes
//! before the request is assigned to it, hyper-util sends the call over another connection of the lane. The permit is
//! then released, and the call takes a stream of the connection that it uses, whether or not one is free.
//!
//! A connection is registered when its SETTINGS arrive, because its maximum is unknown before. While a call opens a
//! connection ([`Opening`]), no other call opens one to the same host. The right passes from the call to the connection
//! ([`Conn::store_opening`]) and ends with the SETTINGS, so that calls which queue meanwhile do not open further
//! connections.
//!
//! The SETTINGS may arrive before the call that opened the connection is polled again. [`Streams::register`] then
//! reserves a stream for this call, so that other calls cannot take all streams.
//!
//! A host that has used HTTP/2 may negotiate HTTP/1 for a later connection. Its calls still wait for streams. The
//! connection is therefore registered with one stream at its first write, so that the end of a call wakes the queue.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::Poll,
};

use tokio::sync::Notify;

use super::{
    conn::Conn,
    hosts::{Host, HostRef, HostVersion},
    semaphore::{PermitPair, ShrinkableSemaphore},
};
use crate::sync::{Mutex, MutexGuard};

/// The maximum number of HTTP/2 connections of a client to one host.
pub(super) const MAX_LANES: usize = 64;

/// One of hyper-util's clients in a [`Client`](super::client::Client).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lane {
    /// The id of the [`Client`](super::client::Client).
    pub(super) client_id: u64,
    pub(super) index: usize,
}

/// The HTTP/2 connections of a client to a host. Several clients may share a layer, but not connections, so each has a
/// queue of its own. No user code runs under the lock of `state`.
pub(super) struct Streams {
    pub(super) host: Arc<Host>,
    /// The id of the [`Client`](super::client::Client).
    pub(super) client_id: u64,
    pub(super) version: HostVersion,
    /// The queue for a stream. The call with the only permit is the first call of the queue.
    pub(super) head: Arc<ShrinkableSemaphore>,
    /// The number of [`HostRef`]s.
    pub(super) users: AtomicUsize,
    state: Mutex<LaneState>,
    /// Wakes the first call of the queue.
    changed: Notify,
    /// Wakes all calls that wait for the first connection.
    came_up: Notify,
    /// The number of calls in the queue. While it is zero, a call takes a stream without the head of the queue.
    queued: AtomicUsize,
    /// The number of calls in the queue that may open an additional connection.
    queued_may_add: AtomicUsize,
}

#[derive(Default)]
struct LaneState {
    /// The connections whose SETTINGS have arrived, until they are closed.
    open: Vec<Arc<Conn>>,
    /// The lane in which a call opens a connection, if one does.
    opening: Option<Lane>,
    /// The permits of the connection that this call opens, if it has reserved them.
    permits: Option<PermitPair>,
}

/// The next action of the first call of the queue.
pub(super) enum Pick {
    Send(StreamPermit),
    Open(Opening),
    /// Wait for a change. With `for_permits`, a free permit for another connection is a change too.
    Wait {
        for_permits: bool,
    },
}

impl Streams {
    pub(super) fn new(host: Arc<Host>, client_id: u64) -> Self {
        Self {
            host,
            client_id,
            version: HostVersion::default(),
            head: ShrinkableSemaphore::new(1),
            users: AtomicUsize::new(0),
            state: Mutex::default(),
            changed: Notify::new(),
            came_up: Notify::new(),
            queued: AtomicUsize::new(0),
            queued_may_add: AtomicUsize::new(0),
        }
    }

    /// Takes a free stream of the first connection that has one, unless calls queue for it.
    pub(super) fn try_take(&self) -> Option<StreamPermit> {
        if self.queued.load(Ordering::SeqCst) > 0 {
            return None;
        }
        self.state().try_take()
    }

    /// Adds a call to the queue, until the guard is dropped.
    pub(super) fn queue(&self, may_add: bool) -> StreamQueueGuard<'_> {
        let before = self.queued.fetch_add(1, Ordering::SeqCst);
        if may_add && self.queued_may_add.fetch_add(1, Ordering::SeqCst) < before {
            // The first call may have to pass the head of the queue to this one.
            self.notify();
        }
        StreamQueueGuard { streams: self, may_add }
    }

    /// Returns whether a call in the queue may open an additional connection.
    pub(super) fn may_any_add(&self) -> bool {
        self.queued_may_add.load(Ordering::SeqCst) > 0
    }

    /// Decides the next action of the first call of the queue. It opens an additional connection only with `permits`
    /// for it, and only if `may_add`.
    pub(super) fn pick(self: &Arc<Self>, permits: &mut Option<PermitPair>, may_add: bool) -> Pick {
        let mut state = self.state();
        if let Some(permit) = state.try_take() {
            return Pick::Send(permit);
        }
        if state.opening.is_some() {
            return Pick::Wait { for_permits: false };
        }
        let is_additional = state.is_up();
        if is_additional && (permits.is_none() || !may_add) {
            return Pick::Wait { for_permits: may_add };
        }
        let Some(index) = state.free_lane() else {
            // Every lane has a connection, so a connection that is to be closed takes this call. The call retires the
            // connection, which frees its lane.
            return match state.take(|_| true) {
                Some(permit) => Pick::Send(permit),
                None => Pick::Wait { for_permits: false },
            };
        };
        let lane = Lane { client_id: self.client_id, index };
        state.opening = Some(lane);
        state.permits = permits.take();
        Pick::Open(Opening { client: self.clone(), lane, is_additional })
    }

    /// Returns the right to open the first connection, unless another call has it.
    pub(super) fn try_open(self: &Arc<Self>) -> Option<Opening> {
        let mut state = self.state();
        if state.opening.is_some() {
            return None;
        }
        let lane = Lane { client_id: self.client_id, index: state.free_lane()? };
        state.opening = Some(lane);
        Some(Opening { client: self.clone(), lane, is_additional: false })
    }

    /// Returns whether there is a connection that takes calls.
    pub(super) fn is_up(&self) -> bool {
        self.state().is_up()
    }

    /// Adds a connection whose SETTINGS have arrived.
    pub(super) fn register(&self, conn: &Arc<Conn>) {
        let opening = conn.take_opening();
        {
            let mut state = self.state();
            // The call that opens this connection has not been polled since the connect: reserve a stream for it.
            if opening.is_none() && state.opening.is_some() && state.opening == conn.lane() {
                conn.reserve_stream();
            }
            state.open.push(conn.clone());
        }
        drop(opening);
        self.notify();
        self.came_up.notify_waiters();
    }

    /// Removes a connection that is closed.
    pub(super) fn unregister(&self, id: u64) {
        let removed = {
            let mut state = self.state();
            let position = state.open.iter().position(|conn| conn.id() == id);
            position.map(|position| state.open.remove(position))
        };
        // Drop the connection without the lock: it contains a waker, whose destructor is user code.
        drop(removed);
        self.notify();
    }

    /// Retires the connections of a lane that has a newer one.
    pub(super) fn retire_lane(&self, lane: Option<Lane>) {
        let any_retired = {
            let state = self.state();
            let of_lane = state.open.iter().filter(|conn| lane.is_some() && conn.lane() == lane);
            of_lane.filter(|conn| conn.set_retired()).count() > 0
        };
        if any_retired {
            self.notify();
        }
    }

    /// Waits until a connection is added.
    pub(super) fn came_up(&self) -> impl Future<Output = ()> {
        self.came_up.notified()
    }

    /// Wakes the first call of the queue.
    pub(super) fn notify(&self) {
        self.changed.notify_one();
    }

    /// Takes the permits of the connection that is opened in this lane, if the call has reserved them.
    pub(super) fn take_permits(&self, lane: Lane) -> Option<PermitPair> {
        let mut state = self.state();
        if state.opening == Some(lane) { state.permits.take() } else { None }
    }

    /// Waits until a stream may be free. With `for_permits`, also waits for the permits of another connection, and
    /// returns them.
    ///
    /// The connection uses these permits. If they were released and acquired again, two hosts that wait for the same
    /// permit would pass it to each other, and neither would open a connection.
    pub(super) async fn changed(
        &self,
        host_ref: &HostRef,
        for_permits: bool,
    ) -> Option<PermitPair> {
        let mut changed = pin!(self.changed.notified());
        let mut permits = pin!(async {
            let shared = &host_ref.shared;
            let own = self.host.permits.acquire().await;
            if let Some(total) = shared.try_acquire_total() {
                return (own, total);
            }
            let _total_wait = host_ref.wait_for_total();
            (own, shared.acquire_total().await)
        });
        poll_fn(|cx| match changed.as_mut().poll(cx) {
            Poll::Pending if for_permits => permits.as_mut().poll(cx).map(Some),
            polled => polled.map(|()| None),
        })
        .await
    }

    fn state(&self) -> MutexGuard<'_, LaneState> {
        self.state.lock()
    }
}

/// A call in the queue.
pub(super) struct StreamQueueGuard<'a> {
    streams: &'a Streams,
    may_add: bool,
}

impl Drop for StreamQueueGuard<'_> {
    fn drop(&mut self) {
        self.streams.queued_may_add.fetch_sub(usize::from(self.may_add), Ordering::SeqCst);
        self.streams.queued.fetch_sub(1, Ordering::SeqCst);
    }
}

impl LaneState {
    /// Returns the connections that take calls.
    fn in_use(&self) -> impl Iterator<Item = &Arc<Conn>> {
        self.open.iter().filter(|conn| !conn.is_retired())
    }

    /// Takes a free stream. Prefers a connection that is not to be closed, so that the others become idle and close.
    fn try_take(&self) -> Option<StreamPermit> {
        self.take(|conn| conn.close_reason().is_none())
            .or_else(|| self.take(|conn| !conn.must_retire()))
    }

    fn take(&self, may_take: impl Fn(&Conn) -> bool) -> Option<StreamPermit> {
        let conn = self.in_use().find(|conn| may_take(conn) && conn.try_take_stream())?;
        Some(StreamPermit { conn: conn.clone(), is_forgotten: false })
    }

    /// Returns whether there is a connection that takes calls. If every lane has a connection, no other connection can
    /// be opened, so calls use these connections although they are to be closed.
    fn is_up(&self) -> bool {
        self.in_use().any(|conn| !conn.must_retire()) || self.free_lane().is_none()
    }

    /// Returns a lane for a new connection. A lane without a connection is preferred to one whose connection takes no
    /// further calls.
    fn free_lane(&self) -> Option<usize> {
        let (mut has_any, mut is_used) = ([false; MAX_LANES], [false; MAX_LANES]);
        for conn in &self.open {
            if let Some(lane) = conn.lane() {
                let index = lane.index % MAX_LANES;
                has_any[index] = true;
                is_used[index] |= !conn.is_retired();
            }
        }
        let free = |lanes: &[bool]| lanes.iter().position(|is_used| !is_used);
        free(&has_any).or_else(|| free(&is_used))
    }
}

/// The permit to send one call over an HTTP/2 connection.
pub(super) struct StreamPermit {
    conn: Arc<Conn>,
    is_forgotten: bool,
}

impl StreamPermit {
    /// Takes a stream of a connection that a call already uses, whether or not one is free.
    pub(super) fn seize(conn: &Arc<Conn>) -> Self {
        conn.seize_stream();
        Self { conn: conn.clone(), is_forgotten: false }
    }

    pub(super) fn lane(&self) -> Option<Lane> {
        self.conn.lane()
    }

    pub(super) fn is_of(&self, conn: &Conn) -> bool {
        self.conn.id() == conn.id()
    }

    /// Returns whether the call may be sent over another connection.
    pub(super) fn is_retired(&self) -> bool {
        self.conn.is_retired()
    }

    /// Leaves it to the end of the call to release the stream.
    pub(super) fn forget(mut self) {
        self.is_forgotten = true;
    }
}

impl Drop for StreamPermit {
    fn drop(&mut self) {
        if !self.is_forgotten {
            self.conn.release_stream();
        }
    }
}

/// The right to open a connection in this lane. After it is dropped, the next call may open a connection.
pub(super) struct Opening {
    client: Arc<Streams>,
    lane: Lane,
    /// Another connection takes calls.
    is_additional: bool,
}

impl Opening {
    pub(super) fn lane(&self) -> Lane {
        self.lane
    }

    pub(super) fn is_additional(&self) -> bool {
        self.is_additional
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        let streams = &self.client;
        let unused = {
            let mut state = streams.state();
            state.opening = None;
            for conn in state.open.iter().filter(|conn| conn.lane() == Some(self.lane)) {
                conn.release_reserved();
            }
            state.permits.take()
        };
        // Without the lock: this runs the wakers of other calls.
        drop(unused);
        streams.notify();
    }
}
