//! The stages of a connection and their time limits.
//!
//! ```text
//!  accept ──▶ head ──▶ call ──▶ idle ──▶ head ──▶ …          read side, one stage at a time
//!                      └ write blocked, again and again      write side, beside it
//! ```
//!
//! hyper has one timer for both an idle HTTP/1 connection and an incomplete head. It has no timer for an incomplete
//! HTTP/2 preface or header block, and none for a client that does not read. Three parts replace hyper's timer:
//!
//! - [`StagedIo`] is the IO object under hyper. It records every read and write in the [`ConnectionState`], and ends a
//!   blocked write itself.
//! - [`CallGuard`] exists once for each call. It records the start and the end of the call.
//! - [`StageClock`] belongs to the connection's task, which checks it each time that hyper waits. The records determine
//!   the stage, and the stage determines the limit.
//!
//! A request that meets the limits costs one read of the clock (when the connection becomes idle) and no timer
//! operation: see [`LazyTimer`]. hyper's own header timer, which is off, costs a boxed timer per request.
//!
//! # Memory orderings
//!
//! All accesses are relaxed. Only the task of the connection uses the flags of the state, because the IO object, the
//! service and the clock belong to this task. (After an upgrade, the handler's task owns the IO object, and the clock
//! no longer exists.) Only the count of calls is also changed by other tasks: the tasks of HTTP/2 streams drop their
//! [`CallGuard`]s. The count publishes no other data, and a drop does not have to wake the connection's task, because
//! the timer of the stage wakes it. A change that makes another task write a flag, or read data that the count
//! protects, needs stronger orderings.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};

use crate::{
    event::event,
    listener::{ConnectionSlot, Frames, LazyTimer, Preface, PrefaceMatch},
    outcome::{LayerKind, TimeoutPhase},
};

const LAYER: &str = LayerKind::Lifecycle.as_str();

/// Maximum time for the graceful shutdown of a connection without calls.
const RETIRE_TIMEOUT: Duration = Duration::from_secs(1);
/// Maximum time for the graceful shutdown of a connection whose slot a new connection waits for.
const RECLAIM_SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(100);

/// The time limits of the stages.
#[derive(Clone, Copy, Debug)]
pub(super) struct StageLimits {
    /// From the accept to the end of the first head, and from the first byte of a later head to its end.
    pub(super) head: Duration,
    /// From the end of the last call to the next request.
    pub(super) idle: Duration,
    /// For a write that makes no progress. `None`: no limit.
    pub(super) write: Option<Duration>,
}

// ===== The shared state of a connection =====

/// The state that the IO object, the service, the calls and the clock of one connection share.
#[derive(Debug)]
pub(super) struct ConnectionState {
    calls: AtomicUsize,
    /// HTTP/1: bytes were read outside of a call. Until a call begins, they are a part of a head.
    has_unparsed: AtomicBool,
    /// HTTP/1: the last request has a body, of which a part may still arrive after the end of its call.
    has_late_body: AtomicBool,
    /// The protocol is not known yet; HTTP/2: the next byte belongs to the preface, or to an incomplete frame or header
    /// block.
    is_mid_frame: AtomicBool,
    /// A head has ended since the last check.
    has_ended_head: AtomicBool,
    /// The client has used the connection since the last check.
    is_used: AtomicBool,
    is_http1: AtomicBool,
    /// The preface is complete.
    is_http2: AtomicBool,
    /// HTTP/2: the client has acknowledged a PING since [`await_acknowledgement`](Self::await_acknowledgement).
    has_acknowledged: AtomicBool,
    /// Number of writes that made progress.
    writes: AtomicUsize,
    /// The last write or flush is pending, so that hyper has data in its buffer.
    is_write_pending: AtomicBool,
    slot: Option<ConnectionSlot>,
}

impl ConnectionState {
    pub(super) fn new(slot: Option<ConnectionSlot>) -> Arc<Self> {
        Arc::new(Self {
            calls: AtomicUsize::new(0),
            has_unparsed: AtomicBool::new(false),
            has_late_body: AtomicBool::new(false),
            is_mid_frame: AtomicBool::new(true),
            has_ended_head: AtomicBool::new(false),
            is_used: AtomicBool::new(false),
            is_http1: AtomicBool::new(false),
            is_http2: AtomicBool::new(false),
            has_acknowledged: AtomicBool::new(false),
            writes: AtomicUsize::new(0),
            is_write_pending: AtomicBool::new(false),
            slot,
        })
    }

    pub(super) fn has_calls(&self) -> bool {
        self.calls.load(Relaxed) > 0
    }

    /// Returns whether the protocol is known to be HTTP/1.
    pub(super) fn is_http1(&self) -> bool {
        self.is_http1.load(Relaxed)
    }

    /// Returns whether the protocol is known to be HTTP/2.
    pub(super) fn is_http2(&self) -> bool {
        self.is_http2.load(Relaxed)
    }

    /// Clears earlier acknowledgements. Called when a PING is sent.
    pub(super) fn await_acknowledgement(&self) {
        self.has_acknowledged.store(false, Relaxed);
    }

    /// Returns the number of writes that made progress.
    pub(super) fn writes(&self) -> usize {
        self.writes.load(Relaxed)
    }

    /// Returns whether the connection can be closed without cutting a call or the rest of a response, provided that
    /// nothing has been written for some time.
    pub(super) fn may_close(&self) -> bool {
        !self.has_calls()
            && !self.is_write_pending.load(Relaxed)
            && !self.has_acknowledged.load(Relaxed)
    }

    /// Returns whether a part of the body of the last HTTP/1 request may still arrive.
    pub(super) fn has_late_body(&self) -> bool {
        self.has_late_body.load(Relaxed) && self.has_unparsed.load(Relaxed)
    }

    fn record_write<T>(&self, polled: &Poll<io::Result<T>>, op: WriteOp) {
        self.is_write_pending.store(polled.is_pending(), Relaxed);
        // Only writes count: hyper also flushes when it has no data.
        if polled.is_ready() && matches!(op, WriteOp::Write) {
            // Only the connection's task writes, so no atomic increment is needed.
            self.writes.store(self.writes().wrapping_add(1), Relaxed);
        }
    }

    /// Records that the connection now belongs to a handler: its slot stays busy and is not reclaimed.
    pub(super) fn upgrade(&self) {
        if let Some(slot) = &self.slot {
            slot.set_busy();
        }
    }
}

/// Clears a flag that only one task uses, without an atomic read-modify-write. Returns whether it was set.
#[inline]
fn clear(flag: &AtomicBool) -> bool {
    let value = flag.load(Relaxed);
    if value {
        flag.store(false, Relaxed);
    }
    value
}

/// A call of a connection, from its dispatch to the end of its response body.
#[derive(Debug)]
pub(super) struct CallGuard(Arc<ConnectionState>);

impl CallGuard {
    #[inline]
    pub(super) fn new(state: &Arc<ConnectionState>, has_body: bool) -> Self {
        state.has_late_body.store(has_body, Relaxed);
        state.calls.fetch_add(1, Relaxed);
        state.has_unparsed.store(false, Relaxed);
        state.has_ended_head.store(true, Relaxed);
        state.is_used.store(true, Relaxed);
        if let Some(slot) = &state.slot {
            slot.set_busy();
        }
        Self(state.clone())
    }

    pub(super) fn connection(&self) -> &ConnectionState {
        &self.0
    }
}

impl Drop for CallGuard {
    #[inline]
    fn drop(&mut self) {
        self.0.calls.fetch_sub(1, Relaxed);
    }
}

// ===== The clock =====

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ConnectionStage {
    /// The rest of a head is missing.
    Head(Instant),
    /// A call is in flight, or the next check has to determine the stage.
    Call,
    /// No call since this instant.
    Idle(Instant),
    /// The idle time is over, or the slot is reclaimed: hyper has been shutting the connection down since
    /// this instant.
    Retired(Instant),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Awaits {
    /// The rest of a head.
    Head,
    CallEnd,
    /// The next request.
    Request,
}

/// The next action of a connection's task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StageVerdict {
    /// Wait. The task is woken when the time of the stage is over.
    Wait,
    /// Shut the connection down gracefully: its idle time is over, or its slot is reclaimed.
    ShutDown,
    /// Drop the connection: a head is incomplete after its time, or a graceful shutdown has not ended in time.
    Close,
}

/// The clock of a connection's stages.
#[derive(Debug)]
pub(super) struct StageClock {
    state: Arc<ConnectionState>,
    limits: StageLimits,
    stage: ConnectionStage,
    timer: LazyTimer,
}

impl StageClock {
    pub(super) fn new(state: Arc<ConnectionState>, limits: StageLimits, accepted: Instant) -> Self {
        Self { state, limits, stage: ConnectionStage::Head(accepted), timer: LazyTimer::new() }
    }

    fn awaits(&self) -> Awaits {
        let state = &*self.state;
        if state.has_unparsed.load(Relaxed) || state.is_mid_frame.load(Relaxed) {
            Awaits::Head
        } else if state.has_calls() {
            Awaits::CallEnd
        } else {
            Awaits::Request
        }
    }

    /// Determines the stage, and returns the next action. The task calls it each time that hyper's connection returns
    /// `Pending`.
    ///
    /// It does not read the clock while the stage is unchanged, or when a call begins. The timer then remains armed for
    /// the end of an earlier stage. When it fires, [`determine_stage`](Self::determine_stage) arms it for the stage of
    /// that moment.
    #[inline]
    pub(super) fn check(&mut self, cx: &mut Context<'_>) -> StageVerdict {
        let awaits = self.awaits();
        if clear(&self.state.has_ended_head) && matches!(self.stage, ConnectionStage::Head(_)) {
            self.stage = ConnectionStage::Call;
            if self.limits.idle < self.limits.head {
                // The timer is armed for the end of the head, which may be later than the end of the idle time.
                let is_reclaimed =
                    self.state.slot.as_ref().is_some_and(ConnectionSlot::is_reclaimed);
                return self.determine_stage(awaits, is_reclaimed, cx);
            }
        }
        let is_same = match (awaits, self.stage) {
            (Awaits::Head, ConnectionStage::Head(_)) | (Awaits::CallEnd, ConnectionStage::Call) => {
                true
            }
            (Awaits::Request, ConnectionStage::Idle(_) | ConnectionStage::Retired(_)) => {
                !self.state.is_used.load(Relaxed)
            }
            _ => false,
        };
        let is_reclaimed = self.state.slot.as_ref().is_some_and(ConnectionSlot::is_reclaimed);
        if is_same && !is_reclaimed && self.timer.is_armed() && !self.timer.has_fired(cx) {
            return StageVerdict::Wait;
        }
        if awaits == Awaits::CallEnd && self.timer.is_armed() && !self.timer.has_fired(cx) {
            // The timer remains armed for the end of an earlier stage, and wakes the task then.
            self.stage = ConnectionStage::Call;
            return StageVerdict::Wait;
        }
        self.determine_stage(awaits, is_reclaimed, cx)
    }

    fn determine_stage(
        &mut self,
        awaits: Awaits,
        is_reclaimed: bool,
        cx: &mut Context<'_>,
    ) -> StageVerdict {
        let now = Instant::now();
        let is_used = clear(&self.state.is_used);
        self.stage = match (awaits, self.stage) {
            (Awaits::Head, ConnectionStage::Head(since)) => ConnectionStage::Head(since),
            (Awaits::Head, _) => ConnectionStage::Head(now),
            (Awaits::CallEnd, _) => ConnectionStage::Call,
            (Awaits::Request, ConnectionStage::Idle(since)) if !is_used => {
                ConnectionStage::Idle(since)
            }
            (Awaits::Request, ConnectionStage::Retired(since)) if !is_used => {
                ConnectionStage::Retired(since)
            }
            (Awaits::Request, _) => {
                if let Some(slot) = &self.state.slot {
                    slot.set_idle(now);
                }
                ConnectionStage::Idle(now)
            }
        };
        if let Some(slot) = &self.state.slot {
            slot.wake_on_reclaim(cx.waker());
        }
        let retire_timeout = if is_reclaimed { RECLAIM_SHUTDOWN_TIMEOUT } else { RETIRE_TIMEOUT };
        let (since, limit) = match self.stage {
            ConnectionStage::Head(since) => (since, self.limits.head),
            ConnectionStage::Idle(since) => (since, self.limits.idle),
            ConnectionStage::Retired(since) => (since, retire_timeout),
            // HTTP/2: the last call can end without a wake of this task. The timer wakes the task instead, which then
            // determines the stage.
            ConnectionStage::Call => (now, self.limits.idle),
        };
        // `None`: the clock cannot represent the deadline, so the stage has no limit.
        let deadline = since.checked_add(limit);
        let is_over = deadline.is_some_and(|deadline| now >= deadline);
        match self.stage {
            ConnectionStage::Head(_) if is_over || is_reclaimed => {
                let reason = if is_over { "head_timeout" } else { "reclaimed" };
                event!(lifecycle, DEBUG, LAYER, "", reason = reason, "connection closed");
                return StageVerdict::Close;
            }
            ConnectionStage::Retired(_) if is_over => return StageVerdict::Close,
            ConnectionStage::Idle(_) if is_over || is_reclaimed => {
                self.stage = ConnectionStage::Retired(now);
                self.timer.arm(now + retire_timeout, now, cx);
                return StageVerdict::ShutDown;
            }
            _ => {}
        }
        if let Some(deadline) = deadline {
            self.timer.arm(deadline, now, cx);
        }
        StageVerdict::Wait
    }
}

// ===== The IO object =====

/// The protocol, as far as the bytes from the client determine it.
#[derive(Debug)]
enum ConnectionProtocol {
    /// Not known yet: the bytes so far are equal to the start of the HTTP/2 preface.
    Preface(Preface),
    Http1,
    Http2(Frames),
}

#[derive(Clone, Copy, Debug)]
enum WriteOp {
    Write,
    /// A flush or a shutdown.
    Flush,
}

/// The IO object of a connection. It records the reads and writes, and limits the time of a blocked write.
#[derive(Debug)]
pub(super) struct StagedIo<Io> {
    io: Io,
    state: Arc<ConnectionState>,
    protocol: ConnectionProtocol,
    write_timeout: Option<Duration>,
    /// The write that makes no progress, and the instant since which the client has read nothing.
    blocked: Option<(Instant, WriteOp)>,
    timer: LazyTimer,
    /// Makes the close of the connection a reset, so that the kernel discards the data that the client does not read.
    reset: fn(&Io),
}

impl<Io> StagedIo<Io> {
    pub(super) fn new(
        io: Io,
        state: Arc<ConnectionState>,
        write_timeout: Option<Duration>,
        reset: fn(&Io),
    ) -> Self {
        let (protocol, timer) = (ConnectionProtocol::Preface(Preface::default()), LazyTimer::new());
        Self { io, state, protocol, write_timeout, blocked: None, timer, reset }
    }

    // ===== Reads =====

    #[inline]
    fn record_read(&mut self, bytes: &[u8]) {
        let state = &*self.state;
        match &mut self.protocol {
            ConnectionProtocol::Http1 => {
                // Bytes that arrive while a call is in flight belong to the body of its request. They can also contain
                // a part of the next head (pipelining). The idle limit holds for such a head until its next byte
                // arrives.
                if !state.has_calls() {
                    state.has_unparsed.store(true, Relaxed);
                }
            }
            ConnectionProtocol::Http2(frames) => {
                let scanned = frames.scan(bytes);
                state.is_mid_frame.store(frames.is_mid_head(), Relaxed);
                if scanned.is_in_use {
                    state.is_used.store(true, Relaxed);
                }
                if scanned.has_ended_head {
                    state.has_ended_head.store(true, Relaxed);
                }
                if scanned.has_ping_ack {
                    state.has_acknowledged.store(true, Relaxed);
                }
            }
            ConnectionProtocol::Preface(_) => self.recognize_protocol(bytes),
        }
    }

    /// Determines the protocol as hyper-util does: HTTP/1 as soon as one byte differs from the HTTP/2 preface.
    #[cold]
    fn recognize_protocol(&mut self, bytes: &[u8]) {
        let ConnectionProtocol::Preface(preface) = &mut self.protocol else { return };
        match preface.scan(bytes) {
            PrefaceMatch::Partial => {}
            PrefaceMatch::Complete(rest) => {
                self.protocol = ConnectionProtocol::Http2(Frames::default());
                self.state.is_http2.store(true, Relaxed);
                self.record_read(rest);
            }
            PrefaceMatch::Differs { .. } => {
                self.protocol = ConnectionProtocol::Http1;
                self.state.is_http1.store(true, Relaxed);
                self.state.is_mid_frame.store(false, Relaxed);
                self.state.has_unparsed.store(true, Relaxed);
            }
        }
    }

    // ===== Writes =====

    #[inline]
    fn check_write<T>(
        &mut self,
        polled: Poll<io::Result<T>>,
        op: WriteOp,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<T>> {
        self.state.record_write(&polled, op);
        match polled {
            Poll::Ready(result) => {
                if let Some((_, blocked)) = self.blocked {
                    // A completed flush is not progress of a blocked write. A completed write is progress of either.
                    if matches!(op, WriteOp::Write) || matches!(blocked, WriteOp::Flush) {
                        self.blocked = None;
                        self.state.is_used.store(true, Relaxed);
                    }
                }
                Poll::Ready(result)
            }
            Poll::Pending => match self.check_blocked(op, cx) {
                Ok(()) => Poll::Pending,
                Err(error) => Poll::Ready(Err(error)),
            },
        }
    }

    #[cold]
    fn check_blocked(&mut self, op: WriteOp, cx: &mut Context<'_>) -> io::Result<()> {
        let Some(limit) = self.write_timeout else { return Ok(()) };
        let is_new = self.blocked.is_none();
        if !is_new && self.timer.is_armed() && !self.timer.has_fired(cx) {
            return Ok(());
        }
        let now = Instant::now();
        let (since, _) = *self.blocked.get_or_insert((now, op));
        let Some(deadline) = since.checked_add(limit) else { return Ok(()) };
        if now >= deadline {
            let reason = TimeoutPhase::Unread.as_str();
            event!(lifecycle, DEBUG, LAYER, "", reason = reason, "connection closed");
            (self.reset)(&self.io);
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the client does not read"));
        }
        self.timer.arm(deadline, now, cx);
        Ok(())
    }
}

impl<Io: AsyncRead + Unpin> AsyncRead for StagedIo<Io> {
    #[inline]
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let read = Pin::new(&mut this.io).poll_read(cx, buf);
        match &read {
            Poll::Ready(Ok(())) => this.record_read(&buf.filled()[before..]),
            Poll::Pending | Poll::Ready(Err(_)) => {}
        }
        read
    }
}

impl<Io: AsyncWrite + Unpin> AsyncWrite for StagedIo<Io> {
    #[inline]
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.io).poll_write(cx, buf);
        this.check_write(written, WriteOp::Write, cx)
    }

    #[inline]
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.io).poll_write_vectored(cx, bufs);
        this.check_write(written, WriteOp::Write, cx)
    }

    #[inline]
    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    #[inline]
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let flushed = Pin::new(&mut this.io).poll_flush(cx);
        this.check_write(flushed, WriteOp::Flush, cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let shut = Pin::new(&mut this.io).poll_shutdown(cx);
        this.check_write(shut, WriteOp::Flush, cx)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::time::advance;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// HTTP/2: the last call ends without a wake of the connection's task, so only the timer of the clock wakes it.
    #[tokio::test(start_paused = true)]
    async fn idle_connection_is_shut_down_after_its_timeout_whatever_the_head_timeout_is() {
        for (head, idle) in [(30, 2), (2, 30), (5, 5)] {
            let limits = StageLimits { head: SECOND * head, idle: SECOND * idle, write: None };
            let state = ConnectionState::new(None);
            state.is_http2.store(true, Relaxed);
            let mut clock = StageClock::new(state.clone(), limits, Instant::now());
            let mut check = tokio_test::task::spawn(poll_fn(|cx| match clock.check(cx) {
                StageVerdict::Wait => Poll::Pending,
                verdict => Poll::Ready(verdict),
            }));
            assert!(check.poll().is_pending());
            state.is_mid_frame.store(false, Relaxed);
            let call = CallGuard::new(&state, false);
            assert!(check.poll().is_pending());
            advance(SECOND).await;
            drop(call);
            let since = Instant::now();
            // The end of the call is detected when the timer fires, after at most one idle time.
            let verdict = loop {
                advance(SECOND).await;
                assert!(
                    since.elapsed() <= 2 * limits.idle + SECOND,
                    "head {head} s, idle {idle} s"
                );
                if check.is_woken() {
                    if let Poll::Ready(verdict) = check.poll() {
                        break verdict;
                    }
                }
            };
            assert_eq!(verdict, StageVerdict::ShutDown);
        }
    }
}
