use std::{
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use super::body_rate::{BodyRate, SharedBodyRate};
use crate::{
    ConfigError,
    call::{
        DeadlineSource, DropCause, Far, Found, Label, LayerFault, LayerKind, Phase, Rejected,
        RejectedKind,
    },
    event,
    event::RepeatedEvent,
};

pub(super) const UNSAID: u32 = u32::MAX;
pub(super) const OFF: u32 = 0;

/// How long each phase of a call may take: the settings of a [`TimeoutLayer`](super::TimeoutLayer), or, in a
/// request's extensions, what one call has instead of them.
///
/// Each phase is a time, off (`None`), or not said: then it is as the layer has it, and off in a layer. In whole
/// milliseconds, rounded up; 49 days at most. No time at all is a mistake: a call that has it is refused.
///
/// ```
/// use std::time::Duration;
/// use buttress::Timeouts;
///
/// let mut request = http::Request::new(());
/// // This one answers late, and then streams for as long as it likes.
/// let patient = Timeouts::new().head(Duration::from_secs(180)).total(None);
/// request.extensions_mut().insert(patient);
/// ```
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    times: Times,
    body_rate: BodyRate,
    /// The first setting that is zero.
    zero: Option<Zero>,
}

/// A setting that is zero.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Zero {
    Phase(Phase),
    BodyGrace,
    MinBodyRate,
}

/// The time of each phase, in milliseconds, [`OFF`] or [`UNSAID`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Times([u32; 7]);

impl Timeouts {
    /// Nothing said.
    #[must_use]
    pub const fn new() -> Self {
        Self { times: Times([UNSAID; 7]), body_rate: BodyRate::UNSAID, zero: None }
    }

    /// A client's: head 30 s; first frame and idle 60 s, as nginx's `proxy_read_timeout`; sending 60 s, as its
    /// `client_body_timeout`; taking 5 minutes, as Envoy's `stream_idle_timeout`; no total, which would cut a
    /// healthy stream.
    #[must_use]
    pub fn http() -> Self {
        let secs = Duration::from_secs;
        let answer = Self::new().head(secs(30)).first_frame(secs(60)).idle(secs(60));
        answer.sending(secs(60)).taking(secs(300)).total(None)
    }

    /// A server's: head 30 s; sending 60 s, as nginx's `client_body_timeout`; taking as head; request bodies of at
    /// least 240 bytes per second after 5 s, as Kestrel's `MinRequestBodyDataRate`. Its response streams may be silent.
    #[must_use]
    pub fn server() -> Self {
        let secs = Duration::from_secs;
        let request = Self::new().head(secs(30)).sending(secs(60));
        let request = request.min_body_rate(240).body_grace(secs(5));
        request.first_frame(None).idle(None).total(None)
    }

    /// Up to the response head, from when the request has been sent.
    #[must_use]
    pub fn head(self, time: impl Into<Option<Duration>>) -> Self {
        self.with(Phase::Head, time.into())
    }

    /// From the response head to the first frame of its body, while it is asked for.
    #[must_use]
    pub fn first_frame(self, time: impl Into<Option<Duration>>) -> Self {
        self.with(Phase::FirstFrame, time.into())
    }

    /// From one frame of the response body to the next, while it is asked for.
    #[must_use]
    pub fn idle(self, time: impl Into<Option<Duration>>) -> Self {
        self.with(Phase::Idle, time.into())
    }

    /// From one frame of the request body to the next, while it is asked for, up to the response head.
    #[must_use]
    pub fn sending(self, time: impl Into<Option<Duration>>) -> Self {
        self.with(Phase::Sending, time.into())
    }

    /// From one frame of the request body being taken to the next being asked for, up to the response head: what
    /// is called so slowly is not slow but stands still. To twice that.
    #[must_use]
    pub fn taking(self, time: impl Into<Option<Duration>>) -> Self {
        self.with(Phase::Taking, time.into())
    }

    /// Sets the timeout of the whole response, from when the request has been sent to the end of the response body, or
    /// `None`. See [`TimeoutLayer::response_total`](super::TimeoutLayer::response_total).
    #[must_use]
    pub fn response_total(self, time: impl Into<Option<Duration>>) -> Self {
        self.with(Phase::ResponseTotal, time.into())
    }

    /// Sets the timeout of the whole call, to the end of the response body, or `None`. See
    /// [`TimeoutLayer::total`](super::TimeoutLayer::total).
    #[must_use]
    pub fn total(self, time: impl Into<Option<Duration>>) -> Self {
        self.with(Phase::Total, time.into())
    }

    /// Sets the minimum rate of a request body in bytes per second, or `None`.
    ///
    /// Only the time for which the body is polled and has no frame counts, also after the response head. See
    /// [`TimeoutLayer::min_body_rate`](super::TimeoutLayer::min_body_rate).
    #[must_use]
    pub fn min_body_rate(mut self, bytes_per_second: impl Into<Option<u32>>) -> Self {
        self.body_rate.min = match bytes_per_second.into() {
            None => OFF,
            Some(0) => {
                self.zero.get_or_insert(Zero::MinBodyRate);
                1
            }
            Some(rate) => rate.min(UNSAID - 1),
        };
        self
    }

    /// Sets the time for which a request body may keep its reader waiting before the minimum rate counts: 5 s by
    /// default. Without effect while there is no [`min_body_rate`](Self::min_body_rate).
    #[must_use]
    pub fn body_grace(mut self, time: Duration) -> Self {
        if time.is_zero() {
            self.zero.get_or_insert(Zero::BodyGrace);
        }
        self.body_rate.grace_ms = millis(time);
        self
    }

    /// Sets whether gRPC requests have to keep the minimum rate, too. They are exempt by default, because a client
    /// stream may be silent.
    #[must_use]
    pub fn min_body_rate_for_grpc(mut self, on: bool) -> Self {
        self.body_rate.grpc = on.into();
        self
    }

    fn with(mut self, phase: Phase, time: Option<Duration>) -> Self {
        self.times.0[phase as usize] = match time {
            None => OFF,
            Some(time) => {
                if time.is_zero() {
                    self.zero.get_or_insert(Zero::Phase(phase));
                }
                millis(time)
            }
        };
        self
    }

    /// What is said of a phase, if it is a time. There is none for [`Phase::Deadline`].
    #[must_use]
    pub fn get(&self, phase: Phase) -> Option<Duration> {
        self.times.get(phase)
    }

    /// Returns the minimum rate of a request body in bytes per second, if there is one.
    #[must_use]
    pub fn get_min_body_rate(&self) -> Option<u32> {
        self.body_rate.min()
    }

    /// Whether they can work.
    ///
    /// # Errors
    ///
    /// A time or a rate of zero.
    pub fn check(&self) -> Result<(), ConfigError> {
        let (field, value, remedy) = match self.zero {
            None => return Ok(()),
            Some(Zero::Phase(phase)) => {
                (phase.as_str(), "0ns", "use a time above zero, or none for no limit")
            }
            Some(Zero::BodyGrace) => ("body_grace", "0ns", "use a time above zero"),
            Some(Zero::MinBodyRate) => {
                ("min_body_rate", "0", "use 1 byte per second or more, or none for no limit")
            }
        };
        Err(ConfigError::new(field, format_args!("{value}"), remedy))
    }

    /// These, and for what they do not say those.
    pub(super) fn or(mut self, those: Self) -> Self {
        for (this, that) in self.times.0.iter_mut().zip(those.times.0) {
            if *this == UNSAID {
                *this = that;
            }
        }
        self.body_rate = self.body_rate.or(those.body_rate);
        self
    }

    /// Returns the settings that a call needs until its end, and those that only the watch over its request body needs.
    #[inline]
    pub(super) fn into_parts(self) -> (Times, BodyRate) {
        (self.times, self.body_rate)
    }
}

/// Returns whole milliseconds, rounded up and at least 1.
fn millis(time: Duration) -> u32 {
    let ms = u32::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(UNSAID);
    ms.clamp(1, UNSAID - 1)
}

impl Times {
    pub(super) fn get(&self, phase: Phase) -> Option<Duration> {
        self.limit(phase).time()
    }

    pub(super) fn limit(&self, phase: Phase) -> Limit {
        Limit(self.0.get(phase as usize).copied().unwrap_or(OFF))
    }

    /// Returns whether a phase depends on the progress of the request.
    pub(super) fn depend_on_the_request(&self) -> bool {
        const PHASES: [Phase; 4] =
            [Phase::Head, Phase::Sending, Phase::Taking, Phase::ResponseTotal];
        PHASES.iter().any(|phase| self.get(*phase).is_some())
    }

    /// Sets the time for taking to the time for the head, if there is none: a handler that never reads its request may
    /// hang as well as another.
    pub(super) fn or_head_for_taking(&mut self) {
        if self.get(Phase::Taking).is_none() {
            self.0[Phase::Taking as usize] = self.0[Phase::Head as usize];
        }
    }
}

/// What is said of one phase. Small: a body has it with it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limit(u32);

impl Limit {
    #[cfg(test)]
    pub(super) fn of(time: Duration) -> Self {
        Self(millis(time))
    }

    #[inline]
    pub(super) fn is_set(self) -> bool {
        !matches!(self.0, OFF | UNSAID)
    }

    pub(super) fn time(self) -> Option<Duration> {
        self.is_set().then(|| Duration::from_millis(self.0.into()))
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Timeouts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut all = f.debug_struct("Timeouts");
        let times = Phase::ALL.iter().zip(self.times.0);
        for (phase, ms) in times.filter(|(_, ms)| *ms != UNSAID) {
            match ms {
                OFF => all.field(phase.as_str(), &format_args!("off")),
                ms => all.field(phase.as_str(), &Duration::from_millis(ms.into())),
            };
        }
        match self.body_rate.min {
            UNSAID => {}
            OFF => {
                all.field("min_body_rate", &format_args!("off"));
            }
            rate => {
                all.field("min_body_rate", &rate).field("body_grace", &self.body_rate.grace());
            }
        }
        all.finish()
    }
}

// ===== What a layer's services share =====

pub(super) struct State {
    ms: [AtomicU32; 7],
    body_rate: SharedBodyRate,
    timed_out: [AtomicU64; 10],
    refused: AtomicU64,
    /// Reports of timeouts that a request carries and that cannot work.
    call_faults: OnceLock<Arc<RepeatedEvent>>,
    label: OnceLock<Arc<Label>>,
    found: Found,
}

impl State {
    pub(super) fn new(timeouts: Timeouts) -> Arc<Self> {
        Arc::new_cyclic(|weak| Self {
            ms: timeouts.times.0.map(AtomicU32::new),
            body_rate: SharedBodyRate::new(timeouts.body_rate),
            timed_out: Default::default(),
            refused: AtomicU64::new(0),
            call_faults: OnceLock::new(),
            label: OnceLock::new(),
            found: Found::at(weak),
        })
    }

    pub(super) fn far(&self) -> Far<Self> {
        self.found.far()
    }

    #[inline]
    pub(super) fn timeouts(&self) -> Timeouts {
        let [head, first, idle, sending, taking, total, response_total] = &self.ms;
        let ms = [head, first, idle, sending, taking, total, response_total];
        let ms = ms.map(|ms| ms.load(Relaxed));
        Timeouts { times: Times(ms), body_rate: self.body_rate.get(), zero: None }
    }

    pub(super) fn set(&self, timeouts: Timeouts) {
        for (ms, said) in self.ms.iter().zip(timeouts.times.0) {
            if said != UNSAID {
                ms.store(said, Relaxed);
            }
        }
        self.body_rate.set(timeouts.body_rate);
    }

    pub(super) fn name(&self, name: &str) {
        let label = || Arc::new(Label { name: name.into(), fault: None });
        self.label.get_or_init(label);
    }

    /// Returns the label of a call that carries timeouts which cannot work. All such calls share their reports.
    #[cold]
    pub(super) fn call_fault(&self, error: ConfigError) -> Arc<Label> {
        let reports = self.call_faults.get_or_init(|| Arc::new(RepeatedEvent::new())).clone();
        Arc::new(Label { name: Box::default(), fault: Some(LayerFault { error, reports }) })
    }

    /// A call whose deadline had passed before it began.
    pub(super) fn refuse(&self, by: LayerKind) -> Rejected {
        self.refused.fetch_add(1, Relaxed);
        event!(
            DEBUG,
            resilience.name = self.name_or_empty(),
            "deadline passed before the call began"
        );
        Rejected::by(by, RejectedKind::DeadlinePassed).labelled(self.label.get().cloned())
    }

    #[cfg_attr(not(feature = "tracing"), allow(dead_code))] // Only events tell it.
    fn name_or_empty(&self) -> &str {
        self.label.get().map_or("", |label| &label.name)
    }
}

/// A call that took too long.
pub(super) fn timed_out(
    far: Far<State>,
    by: LayerKind,
    phase: Phase,
    source: Option<DeadlineSource>,
) -> Rejected {
    let source = source.filter(|_| phase == Phase::Deadline);
    let rejected = Rejected::by(by, RejectedKind::TimedOut(phase)).with_deadline_source(source);
    // Without a layer nobody can ask it any more.
    let Some(state) = far.get() else { return rejected };
    state.timed_out[phase as usize].fetch_add(1, Relaxed);
    event!(DEBUG, resilience.name = state.name_or_empty(), reason = phase.as_str(), "timed out");
    rejected.labelled(state.label.get().cloned())
}

/// Runs `drop`, which drops the inner call after the timeout `limit` of this phase has expired. Inner layers count
/// a hang-up if the caller caused the timeout, and a timeout otherwise.
#[cold]
#[inline(never)]
pub(super) fn drop_by(
    phase: Phase,
    limit: Option<Duration>,
    source: Option<DeadlineSource>,
    drop: impl FnOnce(),
) {
    let cause = match (phase, source) {
        (Phase::Sending | Phase::BodyRate, _) => None,
        (Phase::Deadline, Some(source)) => DropCause::of_deadline(source),
        _ => Some(DropCause::TimedOut(limit)),
    };
    match cause {
        Some(cause) => cause.during(drop),
        None => drop(),
    }
}

/// Returns the rejection of a call whose request body was silent or too slow. The body has counted it.
pub(super) fn stalled(far: Far<State>, by: LayerKind, phase: Phase) -> Rejected {
    let label = far.get().and_then(|state| state.label.get().cloned());
    Rejected::by(by, RejectedKind::TimedOut(phase)).labelled(label)
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.timeouts().fmt(f)
    }
}

// ===== Looking, and changing it while it runs =====

/// Looks at a timeout layer and changes its times, from outside of the stack.
#[derive(Clone, Debug)]
pub struct TimeoutHandle(pub(super) Arc<State>);

/// A timeout layer at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TimeoutSnapshot {
    /// Its times.
    pub timeouts: Timeouts,
    /// How many calls were refused because their [`Deadline`](crate::Deadline) had passed before they began.
    pub refused_deadline: u64,
    timed_out: [u64; 10],
}

impl TimeoutSnapshot {
    /// How many calls took too long, in all.
    #[must_use]
    pub fn timed_out(&self) -> u64 {
        self.timed_out.iter().sum()
    }

    /// How many took too long for this.
    #[must_use]
    pub fn timed_out_by(&self, phase: Phase) -> u64 {
        self.timed_out[phase as usize]
    }
}

impl TimeoutHandle {
    /// All there is to know at this moment.
    #[must_use]
    pub fn snapshot(&self) -> TimeoutSnapshot {
        TimeoutSnapshot {
            timeouts: self.0.timeouts(),
            refused_deadline: self.0.refused.load(Relaxed),
            timed_out: std::array::from_fn(|phase| self.0.timed_out[phase].load(Relaxed)),
        }
    }

    /// Other times, for the calls that begin from now on; what is not said stays.
    ///
    /// # Errors
    ///
    /// What [`Timeouts::check`] finds: then nothing is changed.
    pub fn set(&self, timeouts: Timeouts) -> Result<(), ConfigError> {
        timeouts.check()?;
        self.0.set(timeouts);
        Ok(())
    }
}
