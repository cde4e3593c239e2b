use std::{sync::Arc, task::Context};

use tokio::time::Instant;

use super::{
    body_rate::BodyRate,
    phase_times::{PhaseLimit, PhaseTimes},
    settings::TimeoutState,
    upload::{Upload, UploadStage},
};
use crate::{
    drain::Drains,
    outcome::{LayerKind, TimeoutPhase},
    permit::SlotRef,
    respond::ResponseFormat,
    time::{CallClock, Deadline, DeadlineSource, may_have_expired},
};

/// The timeouts of one call, and which of them have begun. Used until the response head; those of the response body
/// replace them.
#[derive(Debug)]
pub struct CallTimers {
    pub(super) timeouts: PhaseTimes,
    /// When the whole call has to end.
    end: Option<Instant>,
    /// Which setting determines `end`. Without meaning while `end` is `None`.
    end_of: EndCause,
    /// The timeout of the whole call has begun.
    begun: bool,
    /// The timeout of the whole response has begun.
    response_begun: bool,
    pub(super) by: LayerKind,
    pub(super) form: ResponseFormat,
    pub(super) slot: SlotRef<TimeoutState>,
}

/// The setting that determines the end of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EndCause {
    Deadline(DeadlineSource),
    Total,
    ResponseTotal,
}

impl EndCause {
    pub(super) fn phase(self) -> TimeoutPhase {
        match self {
            Self::Deadline(_) => TimeoutPhase::Deadline,
            Self::Total => TimeoutPhase::Total,
            Self::ResponseTotal => TimeoutPhase::ResponseTotal,
        }
    }

    /// Returns the source of the deadline, if a deadline sets the end.
    pub(super) fn source(self) -> Option<DeadlineSource> {
        match self {
            Self::Deadline(source) => Some(source),
            Self::Total | Self::ResponseTotal => None,
        }
    }
}

/// Returns whether an error at this time is the expiry of the deadline that sets the end. The peer or a timer of the
/// client, such as that of a tonic channel on `grpc-timeout`, may expire earlier than the timer of the layer.
pub(super) fn ends_by_deadline(end_of: EndCause, end: Option<Instant>) -> bool {
    matches!(end_of, EndCause::Deadline(_)) && end.is_some_and(may_have_expired)
}

/// The timeouts of a response body. Contains only what the body needs, because every response carries this struct.
#[derive(Debug)]
pub(super) struct BodyTimers {
    pub(super) first_frame: PhaseLimit,
    pub(super) idle: PhaseLimit,
    pub(super) end: Option<Instant>,
    pub(super) end_of: EndCause,
    /// The request, while it is still being sent and the timeout of the whole response has therefore not begun. Boxed,
    /// because it is rare and every response carries this struct.
    late_upload: Option<Box<LateUpload>>,
    /// The first frame has arrived.
    pub(super) begun: bool,
    pub(super) by: LayerKind,
    pub(super) form: ResponseFormat,
    pub(super) slot: SlotRef<TimeoutState>,
}

/// A request that is still being sent while its response arrives.
#[derive(Debug)]
struct LateUpload {
    upload: Arc<Upload>,
    response_total: PhaseLimit,
}

/// The next wait of a call without a response head.
pub(super) enum NextWait {
    /// The call waits until `at`, when the timeout of `phase` expires. If `is_final`, later polls give the same result,
    /// because the request has been sent.
    Until { at: Instant, phase: TimeoutPhase, is_final: bool },
    /// The call waits without a limit.
    Forever,
    /// The request body has stalled or was too slow; the phase states which.
    Stalled(TimeoutPhase),
}

impl CallTimers {
    #[inline]
    pub(super) fn new(
        timeouts: PhaseTimes,
        by: LayerKind,
        form: ResponseFormat,
        slot: SlotRef<TimeoutState>,
    ) -> Self {
        let end_of = EndCause::Total;
        let (begun, response_begun) = (false, false);
        Self { timeouts, end: None, end_of, begun, response_begun, by, form, slot }
    }

    /// Sets the deadline of the call. Returns `false` if it has passed.
    pub(super) fn bound(&mut self, deadline: Deadline) -> bool {
        self.end = Some(deadline.at());
        self.end_of = EndCause::Deadline(deadline.source());
        !CallClock::is_past(self.end)
    }

    /// Returns the source of the deadline, if a deadline sets the end of the call.
    pub(super) fn source(&self) -> Option<DeadlineSource> {
        self.end_of.source()
    }

    /// Returns whether a deadline sets the end of the call.
    pub(super) fn has_deadline(&self) -> bool {
        matches!(self.end_of, EndCause::Deadline(_))
    }

    /// Returns whether anything bounds the call as a whole.
    pub(super) fn has_end(&self) -> bool {
        self.end.is_some() || self.has_total()
    }

    /// Returns whether a timeout of the whole call or of the whole response is set.
    #[inline]
    fn has_total(&self) -> bool {
        let is_set = |phase| self.timeouts.limit(phase).is_set();
        is_set(TimeoutPhase::Total) || is_set(TimeoutPhase::ResponseTotal)
    }

    /// Returns whether an error at this time is the expiry of the deadline that sets the end of the call.
    pub(super) fn ends_by_deadline(&self) -> bool {
        ends_by_deadline(self.end_of, self.end)
    }

    /// Begins the timeout of the whole call, at the first wait or at the response head.
    fn begin(&mut self) {
        if std::mem::replace(&mut self.begun, true) {
            return;
        }
        let total = self.timeouts.limit(TimeoutPhase::Total);
        total.begin(Instant::now, EndCause::Total, &mut self.end, &mut self.end_of);
    }

    /// Begins the timeout of the whole response, when the request has been sent or the response head has arrived.
    fn begin_response(&mut self) {
        if !std::mem::replace(&mut self.response_begun, true) {
            let total = self.timeouts.limit(TimeoutPhase::ResponseTotal);
            total.begin(Instant::now, EndCause::ResponseTotal, &mut self.end, &mut self.end_of);
        }
    }

    /// Returns the shared state of a request body that has to be watched: to time it, to report its progress to the
    /// call, or to drain it when the call times out.
    #[inline]
    pub(super) fn upload(&self, rate: BodyRate, drains: Drains) -> Option<Arc<Upload>> {
        let is_timed = self.timeouts.depend_on_the_request() || rate.min().is_some();
        let is_watched = is_timed || drains != Drains::Never && self.has_end();
        let limit = self.timeouts.limit(TimeoutPhase::Sending);
        is_watched.then(|| Upload::new(limit, rate, is_timed, drains, self.by, self.slot))
    }

    /// Returns the timeouts of the response body after the response head. `ended` states whether the body has ended
    /// with the head. `upload` is taken if the timeout of the whole response depends on the end of the request.
    #[inline]
    pub(super) fn into_body(mut self, ended: bool, upload: &mut Option<Arc<Upload>>) -> BodyTimers {
        let late_upload = if !ended && self.has_total() { self.begin_totals(upload) } else { None };
        let Self { timeouts, end, end_of, by, form, slot, .. } = self;
        let limit = |phase| timeouts.limit(phase);
        let (first_frame, idle) = (limit(TimeoutPhase::FirstFrame), limit(TimeoutPhase::Idle));
        BodyTimers { first_frame, idle, end, end_of, late_upload, begun: false, by, form, slot }
    }

    /// Begins the timeouts of the whole call and of the whole response at the response head. Returns the request if it
    /// is still being sent; the timeout of the whole response then begins at its end.
    #[cold]
    fn begin_totals(&mut self, upload: &mut Option<Arc<Upload>>) -> Option<Box<LateUpload>> {
        self.begin();
        let response_total = self.timeouts.limit(TimeoutPhase::ResponseTotal);
        if !self.response_begun && response_total.is_set() {
            let is_sending = |upload: &mut Arc<Upload>| upload.stage() == UploadStage::HeadFirst;
            if let Some(upload) = upload.take_if(is_sending) {
                return Some(Box::new(LateUpload { upload, response_total }));
            }
        }
        self.begin_response();
        None
    }

    /// Returns the next wait of a call without a response head. Registers its task with the request body while that is
    /// being sent.
    #[inline]
    pub(super) fn wait(&mut self, upload: Option<&Arc<Upload>>, cx: &mut Context<'_>) -> NextWait {
        self.begin();
        let stall = self.timeouts.get(TimeoutPhase::Taking);
        let (stage, due) =
            upload.map_or((UploadStage::Sent, None), |upload| upload.poll(stall, cx));
        let (limit, phase) = match stage {
            UploadStage::Stalled => return NextWait::Stalled(TimeoutPhase::Sending),
            UploadStage::TooSlow => return NextWait::Stalled(TimeoutPhase::BodyRate),
            UploadStage::Sending => (due, TimeoutPhase::Taking),
            // The request has just been sent. The timeout of the head begins.
            UploadStage::Sent
            | UploadStage::HeadFirst
            | UploadStage::SentAfterHead
            | UploadStage::TimedOut => {
                self.begin_response();
                let head = self.timeouts.get(TimeoutPhase::Head);
                (head.and_then(|limit| Instant::now().checked_add(limit)), TimeoutPhase::Head)
            }
        };
        let (at, phase) = match (limit, self.end) {
            (None, None) => return NextWait::Forever,
            (Some(at), Some(end)) if at < end => (at, phase),
            (_, Some(end)) => (end, self.end_of.phase()),
            (Some(at), None) => (at, phase),
        };
        NextWait::Until { at, phase, is_final: stage != UploadStage::Sending }
    }
}

impl PhaseLimit {
    /// Sets the end of a call to this limit from `since`, unless an earlier end is set.
    fn begin(
        self,
        since: impl FnOnce() -> Instant,
        end_of: EndCause,
        end: &mut Option<Instant>,
        set_by: &mut EndCause,
    ) {
        let Some(time) = self.time() else { return };
        if let Some(at) = since().checked_add(time) {
            if end.is_none_or(|end| at < end) {
                (*end, *set_by) = (Some(at), end_of);
            }
        }
    }
}

impl BodyTimers {
    /// Begins the timeout of the whole response once the request has been sent, if the response head arrived before.
    #[inline]
    pub(super) fn begin_response(&mut self, cx: &Context<'_>) {
        if let Some(late) = self.late_upload.take_if(|late| late.upload.poll_sent(cx)) {
            // The body stores the time after it changes the stage, so the time may not be there yet.
            let since = || late.upload.sent_late_at().unwrap_or_else(Instant::now);
            late.response_total.begin(
                since,
                EndCause::ResponseTotal,
                &mut self.end,
                &mut self.end_of,
            );
        }
    }
}
