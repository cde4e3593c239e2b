use std::{
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use crate::{
    ConfigError,
    call::{
        DeadlineSource, DropCause, Far, Found, Label, LayerFault, LayerKind, Phase, Rejected,
        RejectedKind,
    },
    event,
    event::RepeatedEvent,
};

const UNSAID: u32 = u32::MAX;
const OFF: u32 = 0;

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
    ms: [u32; 6],
    /// The first phase that was given no time at all.
    zero: Option<Phase>,
}

impl Timeouts {
    /// Nothing said.
    #[must_use]
    pub const fn new() -> Self {
        Self { ms: [UNSAID; 6], zero: None }
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

    /// A server's: head 30 s; sending 60 s, as nginx's `client_body_timeout`; taking as head. Its streams may be
    /// silent.
    #[must_use]
    pub fn server() -> Self {
        let secs = Duration::from_secs;
        let request = Self::new().head(secs(30)).sending(secs(60));
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

    /// The whole call, to the end of the response body.
    #[must_use]
    pub fn total(self, time: impl Into<Option<Duration>>) -> Self {
        self.with(Phase::Total, time.into())
    }

    fn with(mut self, phase: Phase, time: Option<Duration>) -> Self {
        self.ms[phase as usize] = match time {
            None => OFF,
            Some(time) if time.is_zero() => {
                self.zero.get_or_insert(phase);
                1
            }
            Some(time) => {
                u32::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(UNSAID).min(UNSAID - 1)
            }
        };
        self
    }

    /// What is said of a phase, if it is a time. There is none for [`Phase::Deadline`].
    #[must_use]
    pub fn get(&self, phase: Phase) -> Option<Duration> {
        self.limit(phase).time()
    }

    pub(super) fn limit(&self, phase: Phase) -> Limit {
        Limit(self.ms.get(phase as usize).copied().unwrap_or(OFF))
    }

    /// Whether they can work.
    ///
    /// # Errors
    ///
    /// A phase that was given no time at all.
    pub fn check(&self) -> Result<(), ConfigError> {
        match self.zero {
            None => Ok(()),
            Some(phase) => {
                let remedy = "use a time above zero, or none for no limit";
                Err(ConfigError::new(phase.as_str(), Duration::ZERO, remedy))
            }
        }
    }

    /// These, and for what they do not say those.
    pub(super) fn or(mut self, those: Self) -> Self {
        for (this, that) in self.ms.iter_mut().zip(those.ms) {
            if *this == UNSAID {
                *this = that;
            }
        }
        self
    }

    /// Whether any of them has to do with where the request is.
    pub(super) fn ask_for_the_request(&self) -> bool {
        [Phase::Head, Phase::Sending, Phase::Taking].iter().any(|phase| self.is_on(*phase))
    }

    /// A server has as long to take more of a request as to answer one that is here, if no other time is said:
    /// a handler that never looks at its request may hang as well as another.
    pub(super) fn or_head_for_taking(&mut self) {
        if !self.is_on(Phase::Taking) {
            self.ms[Phase::Taking as usize] = self.ms[Phase::Head as usize];
        }
    }

    fn is_on(&self, phase: Phase) -> bool {
        self.get(phase).is_some()
    }
}

/// What is said of one phase. Small: a body has it with it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limit(u32);

impl Limit {
    pub(super) fn time(self) -> Option<Duration> {
        (!matches!(self.0, OFF | UNSAID)).then(|| Duration::from_millis(self.0.into()))
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
        for (phase, ms) in Phase::ALL.iter().zip(self.ms).filter(|(_, ms)| *ms != UNSAID) {
            match ms {
                OFF => all.field(phase.as_str(), &format_args!("off")),
                ms => all.field(phase.as_str(), &Duration::from_millis(ms.into())),
            };
        }
        all.finish()
    }
}

// ===== What a layer's services share =====

pub(super) struct State {
    ms: [AtomicU32; 6],
    timed_out: [AtomicU64; 7],
    refused: AtomicU64,
    /// Reports of timeouts that a request carries and that cannot work.
    call_faults: OnceLock<Arc<RepeatedEvent>>,
    label: OnceLock<Arc<Label>>,
    found: Found,
}

impl State {
    pub(super) fn new(timeouts: Timeouts) -> Arc<Self> {
        Arc::new_cyclic(|weak| Self {
            ms: timeouts.ms.map(AtomicU32::new),
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
        let [head, first, idle, sending, taking, total] = &self.ms;
        let ms = [head, first, idle, sending, taking, total].map(|ms| ms.load(Relaxed));
        Timeouts { ms, zero: None }
    }

    pub(super) fn set(&self, timeouts: Timeouts) {
        for (ms, said) in self.ms.iter().zip(timeouts.ms) {
            if said != UNSAID {
                ms.store(said, Relaxed);
            }
        }
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
        (Phase::Sending, _) => None,
        (Phase::Deadline, Some(source)) => DropCause::of_deadline(source),
        _ => Some(DropCause::TimedOut(limit)),
    };
    match cause {
        Some(cause) => cause.during(drop),
        None => drop(),
    }
}

/// The refusal of a call whose request body fell silent, which its body has counted.
pub(super) fn stalled(far: Far<State>, by: LayerKind) -> Rejected {
    let label = far.get().and_then(|state| state.label.get().cloned());
    Rejected::by(by, RejectedKind::TimedOut(Phase::Sending)).labelled(label)
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
    timed_out: [u64; 7],
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
