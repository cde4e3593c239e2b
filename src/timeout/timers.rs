use std::{sync::Arc, task::Context};

use tokio::time::Instant;

use super::{
    settings::{Limit, TimeoutState, Times},
    upload::{Sending, Stage},
};
use crate::{
    outcome::{LayerKind, TimeoutPhase},
    permit::Far,
    respond::ResponseFormat,
    time::{CallClock, Deadline, DeadlineSource, may_have_expired},
};

/// The timeouts of one call, and which of them have begun. Used until the response head; then [`Rest`] replaces it.
#[derive(Debug)]
pub struct Watch {
    pub(super) timeouts: Times,
    /// When the whole call has to end.
    end: Option<Instant>,
    /// Which setting determines `end`. Without meaning while `end` is `None`.
    end_of: End,
    /// The timeout of the whole call has begun.
    begun: bool,
    /// The timeout of the whole response has begun.
    response_begun: bool,
    pub(super) by: LayerKind,
    pub(super) form: ResponseFormat,
    pub(super) far: Far<TimeoutState>,
}

/// The setting that determines the end of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Deadline(DeadlineSource),
    Total,
    ResponseTotal,
}

impl End {
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
pub(super) fn ends_by_deadline(end_of: End, end: Option<Instant>) -> bool {
    matches!(end_of, End::Deadline(_)) && end.is_some_and(may_have_expired)
}

/// The timeouts of a response body. Contains only what the body needs, because every response carries this struct.
#[derive(Debug)]
pub(super) struct Rest {
    pub(super) first_frame: Limit,
    pub(super) idle: Limit,
    pub(super) end: Option<Instant>,
    pub(super) end_of: End,
    /// The request, while it is still being sent and the timeout of the whole response has therefore not begun. Boxed,
    /// because it is rare and every response carries this struct.
    upload: Option<Box<Upload>>,
    /// The first frame has arrived.
    pub(super) begun: bool,
    pub(super) by: LayerKind,
    pub(super) form: ResponseFormat,
    pub(super) far: Far<TimeoutState>,
}

/// A request that is still being sent while its response arrives.
#[derive(Debug)]
struct Upload {
    sending: Arc<Sending>,
    response_total: Limit,
}

/// What a call that has no response head yet does next.
pub(super) enum Next {
    /// The call waits until `at`, when the timeout of `phase` expires. If `is_final`, later polls give the same result,
    /// because the request has been sent.
    Until { at: Instant, phase: TimeoutPhase, is_final: bool },
    /// The call waits without a limit.
    Forever,
    /// The request body has stalled or was too slow; the phase states which.
    Stalled(TimeoutPhase),
}

impl Watch {
    #[inline]
    pub(super) fn new(
        timeouts: Times,
        by: LayerKind,
        form: ResponseFormat,
        far: Far<TimeoutState>,
    ) -> Self {
        let end_of = End::Total;
        let (begun, response_begun) = (false, false);
        Self { timeouts, end: None, end_of, begun, response_begun, by, form, far }
    }

    /// Sets the deadline of the call. Returns `false` if it has passed.
    pub(super) fn bound(&mut self, deadline: Deadline) -> bool {
        self.end = Some(deadline.at());
        self.end_of = End::Deadline(deadline.source());
        !CallClock::is_past(self.end)
    }

    /// Returns the source of the deadline, if a deadline sets the end of the call.
    pub(super) fn source(&self) -> Option<DeadlineSource> {
        self.end_of.source()
    }

    /// Returns whether a deadline sets the end of the call.
    pub(super) fn has_deadline(&self) -> bool {
        matches!(self.end_of, End::Deadline(_))
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
        total.begin(Instant::now, End::Total, &mut self.end, &mut self.end_of);
    }

    /// Begins the timeout of the whole response, when the request has been sent or the response head has arrived.
    fn begin_response(&mut self) {
        if !std::mem::replace(&mut self.response_begun, true) {
            let total = self.timeouts.limit(TimeoutPhase::ResponseTotal);
            total.begin(Instant::now, End::ResponseTotal, &mut self.end, &mut self.end_of);
        }
    }

    /// Returns the timeouts of the response body after the response head. `ended` states whether the body has ended
    /// with the head. `request` is taken if the timeout of the whole response depends on the end of the request.
    #[inline]
    pub(super) fn rest(mut self, ended: bool, request: &mut Option<Arc<Sending>>) -> Rest {
        let upload = if !ended && self.has_total() { self.begin_totals(request) } else { None };
        let Self { timeouts, end, end_of, by, form, far, .. } = self;
        let limit = |phase| timeouts.limit(phase);
        let (first_frame, idle) = (limit(TimeoutPhase::FirstFrame), limit(TimeoutPhase::Idle));
        Rest { first_frame, idle, end, end_of, upload, begun: false, by, form, far }
    }

    /// Begins the timeouts of the whole call and of the whole response at the response head. Returns the request if it
    /// is still being sent; the timeout of the whole response then begins at its end.
    #[cold]
    fn begin_totals(&mut self, request: &mut Option<Arc<Sending>>) -> Option<Box<Upload>> {
        self.begin();
        let response_total = self.timeouts.limit(TimeoutPhase::ResponseTotal);
        if !self.response_begun && response_total.is_set() {
            let is_sending = |sending: &mut Arc<Sending>| sending.stage() == Stage::Answered;
            if let Some(sending) = request.take_if(is_sending) {
                return Some(Box::new(Upload { sending, response_total }));
            }
        }
        self.begin_response();
        None
    }

    /// Returns what a call without a response head does next. Registers its task with the request body while that is
    /// being sent.
    #[inline]
    pub(super) fn wait(&mut self, sending: Option<&Arc<Sending>>, cx: &mut Context<'_>) -> Next {
        self.begin();
        let taking = self.timeouts.get(TimeoutPhase::Taking);
        let (stage, due) = sending.map_or((Stage::Sent, None), |sending| sending.poll(taking, cx));
        let (limit, phase) = match stage {
            Stage::Stalled => return Next::Stalled(TimeoutPhase::Sending),
            Stage::TooSlow => return Next::Stalled(TimeoutPhase::BodyRate),
            Stage::Sending => (due, TimeoutPhase::Taking),
            // The request has just been sent. The timeout of the head begins.
            Stage::Sent | Stage::Answered | Stage::AnsweredAndSent | Stage::TimedOut => {
                self.begin_response();
                let head = self.timeouts.get(TimeoutPhase::Head);
                (head.and_then(|limit| Instant::now().checked_add(limit)), TimeoutPhase::Head)
            }
        };
        let (at, phase) = match (limit, self.end) {
            (None, None) => return Next::Forever,
            (Some(at), Some(end)) if at < end => (at, phase),
            (_, Some(end)) => (end, self.end_of.phase()),
            (Some(at), None) => (at, phase),
        };
        Next::Until { at, phase, is_final: stage != Stage::Sending }
    }
}

impl Limit {
    /// Sets the end of a call to this limit from `since`, unless an earlier end is set.
    fn begin(
        self,
        since: impl FnOnce() -> Instant,
        end_of: End,
        end: &mut Option<Instant>,
        set_by: &mut End,
    ) {
        let Some(time) = self.time() else { return };
        if let Some(at) = since().checked_add(time) {
            if end.is_none_or(|end| at < end) {
                (*end, *set_by) = (Some(at), end_of);
            }
        }
    }
}

impl Rest {
    /// Begins the timeout of the whole response once the request has been sent, if the response head arrived before.
    #[inline]
    pub(super) fn begin_response(&mut self, cx: &Context<'_>) {
        if let Some(upload) = self.upload.take_if(|upload| upload.sending.poll_sent(cx)) {
            // The body stores the time after it changes the stage, so the time may not be there yet.
            let since = || upload.sending.sent_late_at().unwrap_or_else(Instant::now);
            upload.response_total.begin(since, End::ResponseTotal, &mut self.end, &mut self.end_of);
        }
    }
}
