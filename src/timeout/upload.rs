//! The request body of a call, and the progress that the body and the call share.
//!
//! # Mechanism
//!
//! A [`SendingBody`] wraps the request body. The transport may poll and drop it in another task than that of the call.
//! The body and the call share an [`Upload`]:
//!
//! - `stage` states the progress of the request body. The body changes it from `Sending` to `Sent`, `Stalled` or
//!   `TooSlow`. The call changes it from `Sending` to `TimedOut` or `HeadFirst`. The body changes `HeadFirst` to
//!   `SentAfterHead`. No other change exists.
//! - `pace` states whether the transport polls the body. Only the task that polls the body writes it.
//! - `waiter` contains the waker of the call and what the call has computed from the pace.
//!
//! # Invariants
//!
//! Each change of the stage is a compare-and-exchange. If the body and the call end the stage `Sending` at the same
//! time, exactly one of them succeeds, and both then read the same stage.
//!
//! The call does not miss the end of the body. It registers its waker under the lock and *then* reads the stage. The
//! body changes the stage and *then* takes the waker under the lock. If the body takes the lock last, it finds the
//! waker. If the call takes the lock last, the body's unlock happens before the call reads the stage, so the call reads
//! the change. A change of this file must preserve both orders.
//!
//! `sent_late_at` is written after the stage has become `SentAfterHead`. A reader that reads this stage may find
//! `None` and then uses the current time.
//!
//! A waker is user code. It is cloned, dropped and woken without the lock. `will_wake` only compares pointers.
//!
//! # Memory orderings
//!
//! The compare-and-exchange of the stage (`AcqRel`) pairs with the load in [`Upload::stage`] (`Acquire`): a task that
//! reads a stage also reads the pace that the other task stored before. Loads and stores of the pace are `Relaxed`: it
//! has a single writer, and the call needs only an estimate of it.

use std::{
    any::Any,
    fmt,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU32, Ordering},
    },
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use http::Request;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tokio::time::Instant;

use super::{
    body_rate::{Allowance, BodyRate},
    idle::IdleTimer,
    phase_times::PhaseLimit,
    settings::{TimeoutState, timed_out},
};
use crate::{
    drain::{self, Drains},
    error::BoxError,
    outcome::{LayerKind, TimeoutPhase, WaitsFor},
    permit::SlotRef,
    sync::{Mutex, MutexGuard},
};

/// The progress of a request body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum UploadStage {
    Sending,
    /// The body was polled to its end or was dropped.
    Sent,
    /// The body was pending for the timeout of [`TimeoutPhase::Sending`].
    Stalled,
    /// The body was slower than the minimum rate.
    TooSlow,
    /// The call has timed out before the body was sent.
    TimedOut,
    /// The response head has arrived, and the body is still being sent. Only a timeout of the whole response depends on
    /// it.
    HeadFirst,
    /// The body has been sent after the response head.
    SentAfterHead,
}

/// The progress of a request body, shared by the call and the body.
pub struct Upload {
    stage: AtomicU8,
    /// Twice the number of polls that returned a frame or the end; plus one after a poll that was pending. The value is
    /// therefore odd while the transport waits for the body, and even while the body waits for the transport. Wraps
    /// around.
    pace: AtomicU32,
    waiter: Mutex<UploadWaiter>,
    /// The timeout of [`TimeoutPhase::Sending`], used until the response head.
    limit: PhaseLimit,
    /// The allowance of the minimum rate, also after the response head.
    allowance: Option<Allowance>,
    by: LayerKind,
    slot: SlotRef<TimeoutState>,
    /// Whether the timeouts of the call depend on the progress of the body. If not, it is watched only to drain it.
    is_timed: bool,
    /// When the body is drained if the call times out.
    drains: Drains,
}

#[derive(Default)]
struct UploadWaiter {
    call: Option<Waker>,
    /// When the timeout of [`TimeoutPhase::Taking`] expires, if the pace is still the one in this pair.
    due: Option<(Instant, u32)>,
    /// When the body was sent, if that was after the response head.
    sent_late_at: Option<Instant>,
}

impl Upload {
    /// Creates the state of a body that is still being sent. `limit` is the timeout of a body that is pending, until
    /// the response head. If not `is_timed`, the timeouts of the call do not depend on the progress of the body.
    pub(super) fn new(
        limit: PhaseLimit,
        rate: BodyRate,
        is_timed: bool,
        drains: Drains,
        by: LayerKind,
        slot: SlotRef<TimeoutState>,
    ) -> Arc<Self> {
        let (stage, pace) = (AtomicU8::new(UploadStage::Sending as u8), AtomicU32::new(0));
        let (allowance, waiter) = (Allowance::new(rate, limit), Mutex::default());
        Arc::new(Self { stage, pace, waiter, limit, allowance, by, slot, is_timed, drains })
    }

    fn waiter(&self) -> MutexGuard<'_, UploadWaiter> {
        self.waiter.lock()
    }

    pub(super) fn stage(&self) -> UploadStage {
        match self.stage.load(Ordering::Acquire) {
            0 => UploadStage::Sending,
            1 => UploadStage::Sent,
            2 => UploadStage::Stalled,
            3 => UploadStage::TooSlow,
            4 => UploadStage::TimedOut,
            5 => UploadStage::HeadFirst,
            _ => UploadStage::SentAfterHead,
        }
    }

    /// Returns what the call waits for, by the progress of the request body.
    pub(super) fn waits_for(&self) -> WaitsFor {
        match (self.stage(), self.pace.load(Ordering::Relaxed)) {
            _ if !self.is_timed => WaitsFor::Upstream,
            (UploadStage::Sending, 0) => WaitsFor::Transport,
            // The transport polled for a frame that the body does not have yet.
            (UploadStage::Sending, pace) if pace % 2 == 1 => WaitsFor::Caller,
            _ => WaitsFor::Upstream,
        }
    }

    /// Changes the stage, unless the body is at another stage than `from`. Returns whether it has changed.
    fn change(&self, from: UploadStage, to: UploadStage) -> bool {
        let (from, to) = (from as u8, to as u8);
        self.stage.compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Ends the call after a timeout. A body that is still being sent is drained when it is dropped. Returns whether it
    /// will be.
    pub(super) fn time_out(&self) -> bool {
        self.change(UploadStage::Sending, UploadStage::TimedOut);
        self.is_drained()
    }

    /// Returns whether the body is drained if it is dropped now, before its end.
    fn is_drained(&self) -> bool {
        matches!(self.stage(), UploadStage::Stalled | UploadStage::TooSlow | UploadStage::TimedOut)
            && match self.drains {
                Drains::Never => false,
                Drains::IfPolled => self.pace.load(Ordering::Relaxed) > 0,
                Drains::Always => true,
            }
    }

    /// Ends the body. Only the first end has an effect, except that a body that outlasts the response head can be sent.
    pub(super) fn end(&self, stage: UploadStage) {
        let is_late = stage == UploadStage::Sent
            && self.change(UploadStage::HeadFirst, UploadStage::SentAfterHead);
        if is_late || self.change(UploadStage::Sending, stage) {
            let mut waiter = self.waiter();
            if is_late {
                waiter.sent_late_at = Some(Instant::now());
            }
            let call = waiter.call.take();
            drop(waiter);
            if let Some(call) = call {
                call.wake();
            }
        }
    }

    /// Registers the task of the call, which is woken when the body leaves the stage `Sending`. Returns the stage, and
    /// when the timeout `request_stall` expires.
    ///
    /// That time begins anew with each call of this method before which the pace has changed, or while the transport
    /// waits for the body (odd pace). It keeps running while the pace is even and unchanged: the transport has not
    /// polled the body since the last frame, or not at all. A poll of the body in another task does not wake the call,
    /// so the call detects it only when its timer expires. The time can therefore be up to twice `request_stall`.
    pub(super) fn poll(
        &self,
        request_stall: Option<Duration>,
        cx: &mut Context<'_>,
    ) -> (UploadStage, Option<Instant>) {
        let mut due = None;
        if self.stage() == UploadStage::Sending {
            let mut waiter = self.waiter();
            let is_known = waiter.call.as_ref().is_some_and(|call| call.will_wake(cx.waker()));
            let pace = self.pace.load(Ordering::Relaxed);
            due = request_stall.and_then(|stall| match waiter.due {
                Some((due, then)) if then == pace && pace % 2 == 0 => Some(due),
                _ => Instant::now().checked_add(stall),
            });
            waiter.due = due.map(|due| (due, pace));
            drop(waiter);
            if !is_known {
                self.register(cx);
            }
        }
        // The stage is read after the waker is registered, so that no end is missed.
        (self.stage(), due)
    }

    fn register(&self, cx: &Context<'_>) {
        // A waker is user code: it is cloned and dropped without the lock.
        let waker = cx.waker().clone();
        let before = self.waiter().call.replace(waker);
        drop(before);
    }

    /// Returns whether the body has been sent, for a call that has its response head. If not, the end of the body wakes
    /// this task.
    pub(super) fn poll_sent(&self, cx: &Context<'_>) -> bool {
        if self.stage() == UploadStage::HeadFirst {
            let wakes = |call: &Waker| call.will_wake(cx.waker());
            let is_known = self.waiter().call.as_ref().is_some_and(wakes);
            if !is_known {
                self.register(cx);
            }
        }
        // The stage is read after the waker is registered, so that no end is missed.
        self.stage() != UploadStage::HeadFirst
    }

    /// Returns when the body was sent, if that was after the response head.
    pub(super) fn sent_late_at(&self) -> Option<Instant> {
        self.waiter().sent_late_at
    }

    /// Returns for how long the body may be pending now, and the phase whose timeout this is.
    fn max_silence(&self) -> (Option<Duration>, TimeoutPhase) {
        if matches!(
            self.stage(),
            UploadStage::Stalled | UploadStage::TooSlow | UploadStage::TimedOut
        ) {
            return (None, TimeoutPhase::Sending);
        }
        let silence = self.limit.time().filter(|_| self.stage() == UploadStage::Sending);
        let allowed = self.allowance.as_ref().map(Allowance::left);
        match (silence, allowed) {
            (silence, Some(allowed)) if silence.is_none_or(|silence| allowed < silence) => {
                (Some(allowed), TimeoutPhase::BodyRate)
            }
            (silence, _) => (silence, TimeoutPhase::Sending),
        }
    }

    /// Records a poll of the body in the pace.
    fn record_poll(&self, is_ready: bool) {
        let pace = self.pace.load(Ordering::Relaxed);
        let next = if is_ready { (pace | 1).wrapping_add(1) } else { pace | 1 };
        self.pace.store(next, Ordering::Relaxed);
    }
}

impl fmt::Debug for Upload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Upload").field(&self.stage()).finish()
    }
}

/// Reports on drop that the body has been sent. A body that is dropped before its end counts as sent, because the
/// transport needs no more of it.
struct SentOnDrop(Option<Arc<Upload>>);

impl Drop for SentOnDrop {
    fn drop(&mut self) {
        if let Some(upload) = &self.0 {
            upload.end(UploadStage::Sent);
        }
    }
}

pin_project! {
    /// A request body that reports its progress to the call, and that fails if it stalls or is too slow.
    ///
    /// Every frame, the trailers, the size hint and the end-of-stream flag are forwarded. Frames of [`Bytes`] longer
    /// than 64 KiB are split into pieces of that size, without a copy. A transport that polls a whole long frame at
    /// once still has to send it, but the body would count as sent.
    pub struct SendingBody<B: Body> {
        #[pin]
        inner: B,
        // One function pointer for both hooks, to keep the body small.
        hooks: fn() -> Hooks<B>,
        // The rest of a frame that is split into pieces.
        rest: Bytes,
        upload: SentOnDrop,
        idle: IdleTimer,
    }

    impl<B: Body> PinnedDrop for SendingBody<B> {
        fn drop(this: Pin<&mut Self>) {
            let this = this.project();
            let Some(upload) = &this.upload.0 else { return };
            // The stage ends first: if the call times out at the same time, both read the same stage.
            upload.end(UploadStage::Sent);
            if upload.is_drained() {
                ((this.hooks)().drain)(this.inner);
            }
        }
    }
}

/// The operations of a [`SendingBody`] that depend on the type of its inner body. The struct and its drop have no
/// bounds that permit them.
struct Hooks<B: Body> {
    box_error: fn(B::Error) -> BoxError,
    drain: fn(Pin<&mut B>) -> bool,
}

impl<B: Body<Error: Into<BoxError>> + 'static> Hooks<B> {
    fn new() -> Self {
        Self { box_error: Into::into, drain: drain::drain_pinned }
    }
}

impl<B: Body<Error: Into<BoxError>> + 'static> SendingBody<B> {
    #[inline]
    pub(super) fn unwatched(inner: B) -> Self {
        let (rest, idle) = (Bytes::new(), IdleTimer::new());
        Self { inner, hooks: Hooks::new, rest, upload: SentOnDrop(None), idle }
    }

    /// Reports the progress of the body to `upload` from now on.
    #[inline]
    pub(super) fn watch(&mut self, upload: Arc<Upload>) {
        self.upload = SentOnDrop(Some(upload));
    }
}

/// Returns when the body of a request is drained after a timeout.
#[inline]
pub(super) fn drains<B: 'static>(request: &Request<B>, responds: bool) -> Drains {
    if responds && drain::can_drain_pinned::<B>() { Drains::of(request) } else { Drains::Never }
}

const PIECE: usize = 64 * 1024;

/// Returns the first piece of long `data`, and stores the remainder in `rest`. Returns the whole of data that is not
/// [`Bytes`].
fn cut<D: Buf + 'static>(mut data: D, rest: &mut Bytes) -> D {
    if let Some(bytes) = (&mut data as &mut dyn Any).downcast_mut::<Bytes>() {
        *rest = bytes.split_off(PIECE);
    }
    data
}

/// Returns the next piece of a frame that is split. `None` if the data type is not [`Bytes`].
fn next<D: 'static>(rest: &mut Bytes) -> Option<D> {
    let piece = rest.split_to(rest.len().min(PIECE));
    let mut data: Option<D> = None;
    *(&mut data as &mut dyn Any).downcast_mut()? = Some(piece);
    data
}

impl<B: Body + 'static> Body for SendingBody<B> {
    type Data = B::Data;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, BoxError>>> {
        let mut this = self.project();
        // The bytes of a frame that is split into pieces are recorded with the first piece.
        let is_new = this.rest.is_empty();
        let polled = match is_new {
            true => this.inner.as_mut().poll_frame(cx),
            false => Poll::Ready(next(this.rest).map(|piece| Ok(Frame::data(piece)))),
        };
        if let Some(upload) = &this.upload.0 {
            upload.record_poll(polled.is_ready());
        }
        if let Poll::Ready(mut next) = polled {
            let since = this.idle.end_wait();
            let allowance = this.upload.0.as_ref().and_then(|upload| upload.allowance.as_ref());
            if let (Some(allowance), true, Some(Ok(frame))) = (allowance, is_new, &next) {
                allowance.record(frame.data_ref().map_or(0, Buf::remaining), since);
            }
            let is_long = |frame: &Frame<B::Data>| {
                frame.data_ref().is_some_and(|data| data.remaining() > PIECE)
            };
            if this.upload.0.is_some() && matches!(&next, Some(Ok(frame)) if is_long(frame)) {
                next = next
                    .map(|frame| frame.map(|frame| frame.map_data(|data| cut(data, this.rest))));
            }
            let ended = this.rest.is_empty() && this.inner.is_end_stream();
            if ended || !matches!(next, Some(Ok(_))) {
                *this.upload = SentOnDrop(None);
            }
            return Poll::Ready(next.map(|frame| frame.map_err((this.hooks)().box_error)));
        }
        let Some(upload) = &this.upload.0 else { return Poll::Pending };
        let (max_silence, phase) = upload.max_silence();
        ready!(this.idle.poll(max_silence, None, cx));
        let rejected = timed_out(upload.slot, upload.by, phase, None, max_silence);
        upload.end(if phase == TimeoutPhase::BodyRate {
            UploadStage::TooSlow
        } else {
            UploadStage::Stalled
        });
        // A body that will be drained is watched until its drop.
        if !upload.is_drained() {
            *this.upload = SentOnDrop(None);
        }
        Poll::Ready(Some(Err(Box::new(rejected))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (mut hint, rest) = (self.inner.size_hint(), self.rest.len() as u64);
        // The upper bound is set first: `set_lower` panics if the lower bound exceeds the upper bound.
        if let Some(upper) = hint.upper() {
            hint.set_upper(upper.saturating_add(rest));
        }
        hint.set_lower(hint.lower().saturating_add(rest));
        hint
    }
}

impl<B: Body> fmt::Debug for SendingBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SendingBody").field("upload", &self.upload.0).finish_non_exhaustive()
    }
}
