use std::{
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use super::{
    body_rate::{BodyRate, DEFAULT_GRACE, SharedBodyRate},
    phase_times::{OFF, PhaseTimes, UNSET, millis, setter},
};
use crate::{
    error::ConfigError,
    event::{self, RepeatedEvent, event, settings_changed},
    fault::{LayerFault, LayerName, NameCell},
    outcome::{DropCause, LayerKind, Rejected, RejectedKind, TimeoutPhase},
    permit::{FreeSlots, OwnedSlot, SlotOwner, SlotRef},
    time::DeadlineSource,
};

/// The timeouts of the phases of a call: the settings of a [`TimeoutLayer`](super::layer::TimeoutLayer), or, in the
/// extensions of a request, the timeouts of that call.
///
/// A phase has a time, is off (`None`), or is not set. A phase that a request does not set is that of the layer. A
/// phase that a layer does not set is off. Times are rounded up to whole milliseconds; the maximum is 49 days. A time
/// of zero is invalid, and a call with it is rejected.
///
/// ```
/// use std::time::Duration;
/// use buttress::Timeouts;
///
/// let mut request = http::Request::new(());
/// // The response of this call begins late and then streams without a limit.
/// let patient = Timeouts::new().head(Duration::from_secs(180)).total(None);
/// request.extensions_mut().insert(patient);
/// ```
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    times: PhaseTimes,
    body_rate: BodyRate,
    /// The first setting that is zero.
    zero: Option<Zero>,
}

/// A setting that is zero.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Zero {
    Phase(TimeoutPhase),
    BodyGrace,
    MinBodyRate,
}

impl Timeouts {
    /// The default of [`body_grace`](Self::body_grace): 5 s.
    pub const DEFAULT_BODY_GRACE: Duration = DEFAULT_GRACE;

    /// Returns timeouts of which none is set.
    #[must_use]
    pub const fn new() -> Self {
        Self { times: PhaseTimes([UNSET; 7]), body_rate: BodyRate::UNSET, zero: None }
    }

    /// Returns the timeouts of a client: `head` 30 s; `first_frame` and `response_idle` 60 s, as nginx's
    /// `proxy_read_timeout`; `request_idle` 60 s, as nginx's `client_body_timeout`; `request_stall` 5 minutes, as
    /// Envoy's `stream_idle_timeout`. There is no total, because it would cut off healthy streams.
    #[must_use]
    pub fn http() -> Self {
        let secs = Duration::from_secs;
        let response = Self::new().head(secs(30)).first_frame(secs(60)).response_idle(secs(60));
        response.request_idle(secs(60)).request_stall(secs(300)).total(None)
    }

    /// Returns the timeouts of a server: `head` 30 s; `request_idle` 60 s, as nginx's `client_body_timeout`;
    /// `request_stall` as `head`; a minimum rate of request bodies of 240 bytes per second after 5 s, as Kestrel's
    /// `MinRequestBodyDataRate`. The bodies of responses have no timeout, because a stream may pause.
    #[must_use]
    pub fn server() -> Self {
        let secs = Duration::from_secs;
        let request = Self::new().head(secs(30)).request_idle(secs(60));
        let request = request.min_body_rate(240).body_grace(DEFAULT_GRACE);
        request.first_frame(None).response_idle(None).total(None)
    }

    /// Sets the timeout of the response head, from when the request has been sent, or `None`.
    #[must_use]
    pub fn head(self, time: impl Into<Option<Duration>>) -> Self {
        self.with(TimeoutPhase::Head, time.into())
    }

    /// Sets the timeout of the first frame of the response body, or `None`. Counts only while the body is polled.
    #[must_use]
    pub fn first_frame(self, time: impl Into<Option<Duration>>) -> Self {
        self.with(TimeoutPhase::FirstFrame, time.into())
    }

    /// Sets the timeout between two frames of the response body, or `None`. Counts only while the body is polled.
    #[must_use]
    pub fn response_idle(self, time: impl Into<Option<Duration>>) -> Self {
        self.with(TimeoutPhase::Idle, time.into())
    }

    /// Sets the timeout of each frame of the request body, or `None`. Counts only while the body is polled, and until
    /// the response head.
    #[must_use]
    pub fn request_idle(self, time: impl Into<Option<Duration>>) -> Self {
        self.with(TimeoutPhase::Sending, time.into())
    }

    /// Sets the time for which the wrapped service may leave the request body unpolled, until the response head, or
    /// `None`. If another task polls the body, the call may last up to twice as long.
    #[must_use]
    pub fn request_stall(self, time: impl Into<Option<Duration>>) -> Self {
        self.with(TimeoutPhase::Taking, time.into())
    }

    /// Sets the timeout of the whole response, from when the request has been sent to the end of the response body, or
    /// `None`. See [`TimeoutLayer::response_total`](super::layer::TimeoutLayer::response_total).
    #[must_use]
    pub fn response_total(self, time: impl Into<Option<Duration>>) -> Self {
        self.with(TimeoutPhase::ResponseTotal, time.into())
    }

    /// Sets the timeout of the whole call, to the end of the response body, or `None`. See
    /// [`TimeoutLayer::total`](super::layer::TimeoutLayer::total).
    #[must_use]
    pub fn total(self, time: impl Into<Option<Duration>>) -> Self {
        self.with(TimeoutPhase::Total, time.into())
    }

    /// Sets the minimum rate of a request body in bytes per second, or `None`.
    ///
    /// Only the time for which the body is polled and has no frame counts, also after the response head. See
    /// [`TimeoutLayer::min_body_rate`](super::layer::TimeoutLayer::min_body_rate).
    #[must_use]
    pub fn min_body_rate(mut self, bytes_per_second: impl Into<Option<u32>>) -> Self {
        self.body_rate.min = match bytes_per_second.into() {
            None => OFF,
            Some(0) => {
                self.zero.get_or_insert(Zero::MinBodyRate);
                1
            }
            Some(rate) => rate.min(UNSET - 1),
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
    /// stream may pause.
    #[must_use]
    pub fn min_body_rate_for_grpc(mut self, on: bool) -> Self {
        self.body_rate.grpc = on.into();
        self
    }

    fn with(mut self, phase: TimeoutPhase, time: Option<Duration>) -> Self {
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

    /// Returns the timeout of a phase. `None` if it is off or not set, and for [`TimeoutPhase::Deadline`],
    /// [`TimeoutPhase::BodyRate`] and [`TimeoutPhase::Unread`].
    #[must_use]
    pub fn get(&self, phase: TimeoutPhase) -> Option<Duration> {
        self.times.get(phase)
    }

    /// Returns the minimum rate of a request body in bytes per second, if there is one.
    #[must_use]
    pub fn get_min_body_rate(&self) -> Option<u32> {
        self.body_rate.min()
    }

    /// Checks the settings.
    ///
    /// # Errors
    ///
    /// Fails if a time or a rate is zero.
    pub fn check(&self) -> Result<(), ConfigError> {
        let (field, value, remedy) = match self.zero {
            None => return Ok(()),
            Some(Zero::Phase(phase)) => {
                (setter(phase), "0ns", "use a time above zero, or none for no limit")
            }
            Some(Zero::BodyGrace) => ("body_grace", "0ns", "use a time above zero"),
            Some(Zero::MinBodyRate) => {
                ("min_body_rate", "0", "use 1 byte per second or more, or none for no limit")
            }
        };
        Err(ConfigError::new(field, format_args!("{value}"), remedy))
    }

    /// Returns these settings. A setting that is not set is that of `defaults`.
    pub(super) fn or(mut self, defaults: Self) -> Self {
        for (this, that) in self.times.0.iter_mut().zip(defaults.times.0) {
            if *this == UNSET {
                *this = that;
            }
        }
        self.body_rate = self.body_rate.or(defaults.body_rate);
        self
    }

    /// Returns the settings that a call needs until its end, and those that only its watched request body needs.
    #[inline]
    pub(super) fn into_parts(self) -> (PhaseTimes, BodyRate) {
        (self.times, self.body_rate)
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
        let times = TimeoutPhase::ALL.iter().zip(self.times.0);
        for (phase, ms) in times.filter(|(_, ms)| *ms != UNSET) {
            match ms {
                OFF => all.field(setter(*phase), &format_args!("off")),
                ms => all.field(setter(*phase), &Duration::from_millis(ms.into())),
            };
        }
        match self.body_rate.min {
            UNSET => {}
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

// ===== The shared state =====

/// The state that a layer shares with its clones and services.
///
/// Each field is independent of the others, so `Relaxed` is sufficient for the atomics. A call that begins during
/// [`TimeoutState::set`] may use some of the new timeouts and some of the old.
pub(super) struct TimeoutState {
    ms: [AtomicU32; 7],
    body_rate: SharedBodyRate,
    timed_out: [AtomicU64; 10],
    rejected: AtomicU64,
    misconfigured: AtomicU64,
    /// The layer that rejections and metrics name.
    #[cfg_attr(not(feature = "observe"), allow(dead_code))] // Used by metrics only.
    pub(super) by: LayerKind,
    /// Reports of timeouts that a request carries and that cannot work.
    call_faults: OnceLock<Arc<RepeatedEvent>>,
    label: NameCell,
    /// The layer has built a service.
    is_used: AtomicBool,
    slot: OwnedSlot<Self>,
}

/// Calls find the state by its slot: they need it only if they time out.
impl SlotOwner for TimeoutState {
    type Word = ();

    fn free_slots() -> &'static FreeSlots<Self> {
        static FREE: FreeSlots<TimeoutState> = FreeSlots::new();
        &FREE
    }
}

impl TimeoutState {
    pub(super) fn new(by: LayerKind, timeouts: Timeouts) -> Arc<Self> {
        Self::named(by, timeouts, NameCell::default())
    }

    fn named(by: LayerKind, timeouts: Timeouts, label: NameCell) -> Arc<Self> {
        let state = Arc::new(Self {
            ms: timeouts.times.0.map(AtomicU32::new),
            body_rate: SharedBodyRate::new(timeouts.body_rate),
            timed_out: Default::default(),
            rejected: AtomicU64::new(0),
            misconfigured: AtomicU64::new(0),
            by,
            call_faults: OnceLock::new(),
            label,
            is_used: AtomicBool::new(false),
            slot: OwnedSlot::allocate(),
        });
        state.slot.register(Arc::downgrade(&state));
        state
    }

    /// Returns a state with the same settings and name, that no service uses.
    #[cold]
    pub(super) fn fork(&self) -> Arc<Self> {
        Self::named(self.by, self.timeouts(), self.label.fork())
    }

    pub(super) fn is_used(&self) -> bool {
        self.is_used.load(Relaxed)
    }

    /// Records that the layer has built a service. Writes once, because a layer can be applied once per connection.
    pub(super) fn set_used(&self) {
        if !self.is_used() {
            self.is_used.store(true, Relaxed);
        }
    }

    pub(super) fn slot(&self) -> SlotRef<Self> {
        self.slot.reference()
    }

    #[inline]
    pub(super) fn timeouts(&self) -> Timeouts {
        let ms = self.ms.each_ref().map(|ms| ms.load(Relaxed));
        Timeouts { times: PhaseTimes(ms), body_rate: self.body_rate.get(), zero: None }
    }

    pub(super) fn set(&self, timeouts: Timeouts) {
        for (ms, new) in self.ms.iter().zip(timeouts.times.0) {
            if new != UNSET {
                ms.store(new, Relaxed);
            }
        }
        self.body_rate.set(timeouts.body_rate);
    }

    /// Returns the number of calls that were rejected because their deadline had passed before they began, and of those
    /// that timed out in each phase, in the order of [`TimeoutPhase::ALL`].
    pub(super) fn counts(&self) -> (u64, [u64; TimeoutPhase::ALL.len()]) {
        (self.rejected.load(Relaxed), self.timed_out.each_ref().map(|count| count.load(Relaxed)))
    }

    /// Counts a call that is rejected because a setting of the layer or of the call cannot work.
    #[cold]
    pub(super) fn count_misconfigured(&self) {
        self.misconfigured.fetch_add(1, Relaxed);
    }

    #[cfg(feature = "observe")]
    pub(super) fn misconfigured(&self) -> u64 {
        self.misconfigured.load(Relaxed)
    }

    pub(super) fn name(&self, name: &str) {
        self.label.set(name);
    }

    /// Returns the label of a call that carries timeouts which cannot work. All such calls share their reports.
    #[cold]
    pub(super) fn call_fault(&self, error: ConfigError) -> Arc<LayerName> {
        let reports = self.call_faults.get_or_init(|| Arc::new(RepeatedEvent::new())).clone();
        Arc::new(LayerName { name: Box::default(), fault: Some(LayerFault { error, reports }) })
    }

    /// Counts a call whose deadline has passed before it begins, and returns its rejection.
    pub(super) fn reject(&self, by: LayerKind) -> Rejected {
        self.rejected.fetch_add(1, Relaxed);
        let label = self.label.get().cloned();
        Rejected::by(by, RejectedKind::DeadlinePassed).labelled(label).reported()
    }

    pub(super) fn name_or_empty(&self) -> &str {
        self.label.as_str()
    }
}

/// Counts a call that has timed out in this phase, and returns its rejection. `after` is the timeout of the call, or
/// `None` if it is that of the layer.
pub(super) fn timed_out(
    slot: SlotRef<TimeoutState>,
    by: LayerKind,
    phase: TimeoutPhase,
    source: Option<DeadlineSource>,
    after: Option<Duration>,
) -> Rejected {
    let source = source.filter(|_| phase == TimeoutPhase::Deadline);
    let rejected = Rejected::by(by, RejectedKind::TimedOut(phase)).with_deadline_source(source);
    // The layer, its services and its handles have been dropped, so nothing can read the counters.
    let Some(state) = slot.owner() else { return rejected };
    state.timed_out[phase as usize].fetch_add(1, Relaxed);
    event!(
        timeout,
        DEBUG,
        by.as_str(),
        state.name_or_empty(),
        phase = phase.as_str(),
        after_ms = after.or_else(|| state.timeouts().times.get(phase)).map(event::ms),
        "timed out",
    );
    rejected.labelled(state.label.get().cloned())
}

/// Runs `drop`, which drops the inner call after the timeout `limit` of this phase has expired. Inner layers count
/// a hang-up if the caller caused the timeout, and a timeout otherwise.
#[cold]
#[inline(never)]
pub(super) fn drop_by(
    phase: TimeoutPhase,
    limit: Option<Duration>,
    source: Option<DeadlineSource>,
    drop: impl FnOnce(),
) {
    let cause = match (phase, source) {
        (TimeoutPhase::Sending | TimeoutPhase::BodyRate, _) => None,
        (TimeoutPhase::Deadline, Some(source)) => DropCause::of_deadline(source),
        _ => Some(DropCause::TimedOut(limit)),
    };
    match cause {
        Some(cause) => cause.during(drop),
        None => drop(),
    }
}

/// Returns the rejection of a call whose request body has stalled or was too slow. The body has counted it.
pub(super) fn stalled(slot: SlotRef<TimeoutState>, by: LayerKind, phase: TimeoutPhase) -> Rejected {
    let label = slot.owner().and_then(|state| state.label.get().cloned());
    Rejected::by(by, RejectedKind::TimedOut(phase)).labelled(label)
}

impl fmt::Debug for TimeoutState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.timeouts().fmt(f)
    }
}

// ===== The handle =====

/// Reads the state of a timeout layer and changes its timeouts, from outside of the stack.
#[derive(Clone, Debug)]
pub struct TimeoutHandle(pub(super) Arc<TimeoutState>);

/// A snapshot of a timeout layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TimeoutSnapshot {
    /// The timeouts of the layer.
    pub timeouts: Timeouts,
    /// The number of calls that were rejected because their [`Deadline`](crate::time::Deadline) had passed before they
    /// began.
    pub rejected_deadline: u64,
    timed_out: [u64; 10],
}

impl TimeoutSnapshot {
    /// Returns the number of calls that have timed out, in any phase.
    #[must_use]
    pub fn timed_out(&self) -> u64 {
        self.timed_out.iter().sum()
    }

    /// Returns the number of calls that have timed out in this phase.
    #[must_use]
    pub fn timed_out_by(&self, phase: TimeoutPhase) -> u64 {
        self.timed_out[phase as usize]
    }
}

impl TimeoutHandle {
    /// Returns a snapshot of the layer.
    #[must_use]
    pub fn snapshot(&self) -> TimeoutSnapshot {
        let (rejected_deadline, timed_out) = self.0.counts();
        TimeoutSnapshot { timeouts: self.0.timeouts(), rejected_deadline, timed_out }
    }

    /// Sets several timeouts for the calls that begin from now on. Phases that `timeouts` does not set stay the same.
    ///
    /// # Errors
    ///
    /// Fails if [`Timeouts::check`] fails, and then changes nothing.
    pub fn set(&self, timeouts: Timeouts) -> Result<(), ConfigError> {
        self.set_keys("timeouts", timeouts)
    }

    /// Sets timeouts, and reports the settings with these names as changed.
    fn set_keys(&self, keys: &'static str, timeouts: Timeouts) -> Result<(), ConfigError> {
        timeouts.check()?;
        self.0.set(timeouts);
        let state = &self.0;
        let (layer, name) = (state.by.as_str(), state.name_or_empty());
        settings_changed!(timeout, state.is_used(), layer, name, keys);
        Ok(())
    }
}

macro_rules! live_setters {
    ($($set:ident: $setter:ident($value:ty);)*) => {
        impl TimeoutHandle {
            $(
                #[doc = concat!(
                    "Sets [`", stringify!($setter), "`](super::layer::TimeoutLayer::", stringify!($setter), ")"
                )]
                /// for the calls that begin from now on.
                ///
                /// # Errors
                ///
                /// Fails if the value is zero, and then changes nothing.
                pub fn $set(&self, value: $value) -> Result<(), ConfigError> {
                    self.set_keys(stringify!($setter), Timeouts::new().$setter(value))
                }
            )*
        }
    };
}

live_setters! {
    set_head: head(impl Into<Option<Duration>>);
    set_first_frame: first_frame(impl Into<Option<Duration>>);
    set_response_idle: response_idle(impl Into<Option<Duration>>);
    set_request_idle: request_idle(impl Into<Option<Duration>>);
    set_request_stall: request_stall(impl Into<Option<Duration>>);
    set_min_body_rate: min_body_rate(impl Into<Option<u32>>);
    set_body_grace: body_grace(Duration);
    set_min_body_rate_for_grpc: min_body_rate_for_grpc(bool);
    set_total: total(impl Into<Option<Duration>>);
    set_response_total: response_total(impl Into<Option<Duration>>);
}
