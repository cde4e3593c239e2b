//! The request body of a call, and the progress that the body and the call share.
//!
//! # Mechanism
//!
//! A [`SendingBody`] wraps the request body. The transport may poll and drop it in another task than that of the call.
//! The body and the call share a [`Sending`]:
//!
//! - `stage` states how far the request is. The body changes it from `Sending` to `Sent`, `Stalled` or `TooSlow`. The
//!   call changes it from `Sending` to `TimedOut` or `Answered`. The body changes `Answered` to `AnsweredAndSent`. No
//!   other change exists.
//! - `pace` states whether the transport polls the body. Only the task that polls the body writes it.
//! - `call` contains the waker of the call and what the call has computed from the pace.
//!
//! # Invariants
//!
//! Each change of the stage is a compare-and-exchange. If the body and the call end the stage `Sending` at the same
//! time, exactly one of them succeeds, and both then see the same stage.
//!
//! The call does not miss the end of the body. It registers its waker under the lock and *then* reads the stage. The
//! body changes the stage and *then* takes the waker under the lock. If the body takes the lock last, it finds the
//! waker. If the call takes the lock last, the body's unlock happens before the call reads the stage, so the call sees
//! the change. A change of this file must preserve both orders.
//!
//! `sent_late_at` is written after the stage has become `AnsweredAndSent`. A reader that sees this stage may find
//! `None` and then uses the current time.
//!
//! A waker is user code. It is cloned, dropped and woken without the lock. `will_wake` only compares pointers.
//!
//! # Memory orderings
//!
//! The compare-and-exchange of the stage (`AcqRel`) pairs with the load in [`Sending::stage`] (`Acquire`): a task that
//! sees a stage also sees the pace that the other task stored before. Loads and stores of the pace are `Relaxed`: it
//! has a single writer, and the call needs only an estimate of it.

use std::{
    any::Any,
    fmt,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, AtomicU32, Ordering},
    },
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tokio::time::Instant;

use super::{
    body_rate::{Allowance, BodyRate},
    idle::Stall,
    settings::{Limit, TimeoutState, timed_out},
    timers::Watch,
};
use crate::{
    drain::{Drains, drain_pinned},
    error::BoxError,
    outcome::{LayerKind, TimeoutPhase, WaitsFor},
    permit::Far,
};

/// The progress of a request body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Stage {
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
    Answered,
    /// The body has been sent after the response head.
    AnsweredAndSent,
}

/// The state that a call and its request body share. See the head of this file.
pub struct Sending {
    stage: AtomicU8,
    /// Twice the number of polls that returned a frame or the end; plus one after a poll that was pending. The value is
    /// therefore odd while the transport waits for the body, and even while the body waits for the transport. Wraps
    /// around.
    pace: AtomicU32,
    call: Mutex<Waiting>,
    /// The timeout of [`TimeoutPhase::Sending`], used until the response head.
    limit: Limit,
    /// The allowance of the minimum rate, also after the response head.
    allowance: Option<Allowance>,
    by: LayerKind,
    far: Far<TimeoutState>,
    /// Whether the timeouts of the call depend on the progress of the body. If not, it is watched only to drain it.
    is_timed: bool,
    /// When the body is drained if the call times out.
    drains: Drains,
}

#[derive(Default)]
struct Waiting {
    call: Option<Waker>,
    /// When the timeout of [`TimeoutPhase::Taking`] expires, if the pace is still the one in this pair.
    due: Option<(Instant, u32)>,
    /// When the body was sent, if that was after the response head.
    sent_late_at: Option<Instant>,
}

impl Sending {
    /// Returns whether the progress of the request body has to be reported to its call, or the body has to be timed.
    fn is_timed(watch: &Watch, rate: BodyRate) -> bool {
        watch.timeouts.depend_on_the_request() || rate.min().is_some()
    }

    /// Returns whether the body has to be watched: to time it, or to drain it when the call times out.
    pub(super) fn is_needed(watch: &Watch, rate: BodyRate, drains: Drains) -> bool {
        Self::is_timed(watch, rate) || drains != Drains::Never && watch.has_end()
    }

    fn new(watch: &Watch, rate: BodyRate, drains: Drains) -> Arc<Self> {
        let Watch { timeouts, by, far, .. } = *watch;
        let (stage, pace) = (AtomicU8::new(Stage::Sending as u8), AtomicU32::new(0));
        let (limit, is_timed) =
            (timeouts.limit(TimeoutPhase::Sending), Self::is_timed(watch, rate));
        let (allowance, call) = (Allowance::new(rate, limit), Mutex::default());
        Arc::new(Self { stage, pace, call, limit, allowance, by, far, is_timed, drains })
    }

    fn call(&self) -> MutexGuard<'_, Waiting> {
        self.call.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn stage(&self) -> Stage {
        match self.stage.load(Ordering::Acquire) {
            0 => Stage::Sending,
            1 => Stage::Sent,
            2 => Stage::Stalled,
            3 => Stage::TooSlow,
            4 => Stage::TimedOut,
            5 => Stage::Answered,
            _ => Stage::AnsweredAndSent,
        }
    }

    /// Returns what the call waits for, by the progress of the request body.
    pub(super) fn waits_for(&self) -> WaitsFor {
        match (self.stage(), self.pace.load(Ordering::Relaxed)) {
            _ if !self.is_timed => WaitsFor::Upstream,
            (Stage::Sending, 0) => WaitsFor::Transport,
            // The transport polled for a frame that the body does not have yet.
            (Stage::Sending, pace) if pace % 2 == 1 => WaitsFor::Caller,
            _ => WaitsFor::Upstream,
        }
    }

    /// Changes the stage of a body that is still being sent. Returns `false` if the body was at another stage.
    fn leave(&self, stage: Stage) -> bool {
        self.change(Stage::Sending, stage)
    }

    fn change(&self, from: Stage, to: Stage) -> bool {
        let (from, to) = (from as u8, to as u8);
        self.stage.compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Ends the call after a timeout. A body that is still being sent is drained when it is dropped. Returns whether it
    /// will be.
    pub(super) fn time_out(&self) -> bool {
        self.leave(Stage::TimedOut);
        self.is_drained()
    }

    /// Returns whether the body is drained if it is dropped now, before its end.
    fn is_drained(&self) -> bool {
        matches!(self.stage(), Stage::Stalled | Stage::TooSlow | Stage::TimedOut)
            && match self.drains {
                Drains::Never => false,
                Drains::IfPolled => self.pace.load(Ordering::Relaxed) > 0,
                Drains::Always => true,
            }
    }

    /// Ends the body. Only the first end has an effect, except that a body that outlasts the response head can be sent.
    pub(super) fn end(&self, stage: Stage) {
        let is_late = stage == Stage::Sent && self.change(Stage::Answered, Stage::AnsweredAndSent);
        if is_late || self.leave(stage) {
            let mut waiting = self.call();
            if is_late {
                waiting.sent_late_at = Some(Instant::now());
            }
            let call = waiting.call.take();
            drop(waiting);
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
    /// so the call notices it only when its timer expires. The time can therefore be up to twice `request_stall`.
    pub(super) fn poll(
        &self,
        taking: Option<Duration>,
        cx: &mut Context<'_>,
    ) -> (Stage, Option<Instant>) {
        let mut due = None;
        if self.stage() == Stage::Sending {
            let mut waiting = self.call();
            let is_known = waiting.call.as_ref().is_some_and(|known| known.will_wake(cx.waker()));
            let pace = self.pace.load(Ordering::Relaxed);
            due = taking.and_then(|taking| match waiting.due {
                Some((due, then)) if then == pace && pace % 2 == 0 => Some(due),
                _ => Instant::now().checked_add(taking),
            });
            waiting.due = due.map(|due| (due, pace));
            drop(waiting);
            if !is_known {
                self.wake_by(cx);
            }
        }
        // The stage is read after the waker is registered, so that no end is missed.
        (self.stage(), due)
    }

    fn wake_by(&self, cx: &Context<'_>) {
        // A waker is user code: it is cloned and dropped without the lock.
        let waker = cx.waker().clone();
        let before = self.call().call.replace(waker);
        drop(before);
    }

    /// Returns whether the body has been sent, for a call that has its response head. If not, the end of the body wakes
    /// this task.
    pub(super) fn poll_sent(&self, cx: &Context<'_>) -> bool {
        if self.stage() == Stage::Answered {
            let known = |known: &Waker| known.will_wake(cx.waker());
            let is_known = self.call().call.as_ref().is_some_and(known);
            if !is_known {
                self.wake_by(cx);
            }
        }
        // The stage is read after the waker is registered, so that no end is missed.
        self.stage() != Stage::Answered
    }

    /// Returns when the body was sent, if that was after the response head.
    pub(super) fn sent_late_at(&self) -> Option<Instant> {
        self.call().sent_late_at
    }

    /// Returns for how long the body may be pending now, and the phase whose timeout this is.
    fn max_silence(&self) -> (Option<Duration>, TimeoutPhase) {
        if matches!(self.stage(), Stage::Stalled | Stage::TooSlow | Stage::TimedOut) {
            return (None, TimeoutPhase::Sending);
        }
        let silence = self.limit.time().filter(|_| self.stage() == Stage::Sending);
        let allowed = self.allowance.as_ref().map(Allowance::left);
        match (silence, allowed) {
            (silence, Some(allowed)) if silence.is_none_or(|silence| allowed < silence) => {
                (Some(allowed), TimeoutPhase::BodyRate)
            }
            (silence, _) => (silence, TimeoutPhase::Sending),
        }
    }

    /// Records a poll of the body in the pace. `given` states whether the poll was ready.
    fn step(&self, given: bool) {
        let pace = self.pace.load(Ordering::Relaxed);
        let next = if given { (pace | 1).wrapping_add(1) } else { pace | 1 };
        self.pace.store(next, Ordering::Relaxed);
    }
}

impl fmt::Debug for Sending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Sending").field(&self.stage()).finish()
    }
}

/// Reports on drop that the body has been sent. A body that is dropped before its end counts as sent, because the
/// transport needs no more of it.
struct Tells(Option<Arc<Sending>>);

impl Drop for Tells {
    fn drop(&mut self) {
        if let Some(sending) = &self.0 {
            sending.end(Stage::Sent);
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
        tells: Tells,
        stall: Stall,
    }

    impl<B: Body> PinnedDrop for SendingBody<B> {
        fn drop(this: Pin<&mut Self>) {
            let this = this.project();
            let Some(sending) = &this.tells.0 else { return };
            // The stage ends first: if the call times out at the same time, both see the same stage.
            sending.end(Stage::Sent);
            if sending.is_drained() {
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
        Self { box_error: Into::into, drain: drain_pinned }
    }
}

impl<B: Body<Error: Into<BoxError>> + 'static> SendingBody<B> {
    #[inline]
    pub(super) fn unwatched(inner: B) -> Self {
        let (rest, stall) = (Bytes::new(), Stall::new());
        Self { inner, hooks: Hooks::new, rest, tells: Tells(None), stall }
    }

    /// Watches the body for this call, unless it has ended or neither the timeouts nor a drain need that.
    #[inline]
    pub(super) fn watch(
        &mut self,
        watch: &Watch,
        rate: BodyRate,
        drains: Drains,
    ) -> Option<Arc<Sending>> {
        if self.inner.is_end_stream() || !Sending::is_needed(watch, rate, drains) {
            return None;
        }
        let sending = Sending::new(watch, rate, drains);
        self.tells = Tells(Some(sending.clone()));
        Some(sending)
    }
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
        if let Some(told) = &this.tells.0 {
            told.step(polled.is_ready());
        }
        if let Poll::Ready(mut next) = polled {
            let since = this.stall.over();
            let allowance = this.tells.0.as_ref().and_then(|told| told.allowance.as_ref());
            if let (Some(allowance), true, Some(Ok(frame))) = (allowance, is_new, &next) {
                allowance.record(frame.data_ref().map_or(0, Buf::remaining), since);
            }
            let is_long = |frame: &Frame<B::Data>| {
                frame.data_ref().is_some_and(|data| data.remaining() > PIECE)
            };
            if this.tells.0.is_some() && matches!(&next, Some(Ok(frame)) if is_long(frame)) {
                next = next
                    .map(|frame| frame.map(|frame| frame.map_data(|data| cut(data, this.rest))));
            }
            let ended = this.rest.is_empty() && this.inner.is_end_stream();
            if ended || !matches!(next, Some(Ok(_))) {
                *this.tells = Tells(None);
            }
            return Poll::Ready(next.map(|frame| frame.map_err((this.hooks)().box_error)));
        }
        let Some(told) = &this.tells.0 else { return Poll::Pending };
        let (max_silence, phase) = told.max_silence();
        ready!(this.stall.poll(max_silence, None, cx));
        let rejected = timed_out(told.far, told.by, phase, None);
        told.end(if phase == TimeoutPhase::BodyRate { Stage::TooSlow } else { Stage::Stalled });
        // A body that will be drained is watched until its drop.
        if !told.is_drained() {
            *this.tells = Tells(None);
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
        f.debug_struct("SendingBody").field("told", &self.tells.0).finish_non_exhaustive()
    }
}
