//! Counts the outcomes of whole calls. The meter is the outermost layer of a stack: an admission policy that admits
//! every call.

use std::{
    fmt,
    future::Ready,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::time::Instant;

#[cfg(feature = "observe")]
use crate::observe::{CALL_BOUNDS, ExportCell, FixedHistogram, HistogramSnapshot};
use crate::sync::Mutex;
use crate::{
    admission::{Admit, Plan, Policy, Terms, admission_service},
    classify::Http,
    fault::Fault,
    outcome::{LayerKind, Outcome, OutcomeKind, Reason, Rejected},
    permit::{Permit, Release, ReleaseAt, Token},
    report::ReportCell,
    sealed::Sealed,
    time::{Clock, Nanos, RecentLatency},
};

/// The counters of the calls of a stack.
pub(crate) struct MeterLayer {
    clock: Clock,
    begun: AtomicU64,
    /// The number of calls that have ended, by [`OutcomeKind`], without those that a layer has rejected.
    ended: [AtomicU64; 4],
    /// The number of calls that a layer has rejected.
    rejected: AtomicU64,
    /// The sum of the latencies in nanoseconds. A latency ends at the response head, or without one at the end of the
    /// call.
    took: AtomicU64,
    /// The number of latencies in the sum.
    timed: AtomicU64,
    recent: Mutex<RecentLatency>,
    /// The registries that receive the changes of the settings of the stack.
    pub(super) reports: ReportCell,
    /// The latencies since the stack was made, by the [`OutcomeKind`] at the end of the latency. `recent` cannot be
    /// exported, because its counts fall, and a histogram with fixed bounds has no percentile within 1 %.
    #[cfg(feature = "observe")]
    durations: [FixedHistogram<15>; 4],
}

/// A snapshot of a [`MeterLayer`].
pub(super) struct MeterCounts {
    pub(super) begun: u64,
    pub(super) successes: u64,
    pub(super) failures: u64,
    pub(super) throttled: u64,
    pub(super) cancelled: u64,
    pub(super) rejected: u64,
    pub(super) average: Option<Duration>,
    pub(super) p99: Option<Duration>,
}

impl MeterLayer {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            clock: Clock::new(),
            begun: AtomicU64::new(0),
            ended: Default::default(),
            rejected: AtomicU64::new(0),
            took: AtomicU64::new(0),
            timed: AtomicU64::new(0),
            recent: Mutex::new(RecentLatency::default()),
            reports: ReportCell::default(),
            #[cfg(feature = "observe")]
            durations: std::array::from_fn(|_| FixedHistogram::new(CALL_BOUNDS)),
        })
    }

    fn record_latency(&self, started: Nanos, outcome: Outcome) {
        let now = Instant::now();
        let took = self.clock.at(now).saturating_sub(started);
        self.took.fetch_add(took, Relaxed);
        self.timed.fetch_add(1, Relaxed);
        #[cfg(feature = "observe")]
        {
            let (durations, took) =
                (&self.durations[outcome.kind() as usize], Duration::from_nanos(took));
            durations.record(took);
            durations.export(|| took, || now);
        }
        let _ = outcome;
        let mut recent = self.recent.lock();
        recent.record(Duration::from_nanos(took), now);
    }

    /// Returns the latencies by [`OutcomeKind`].
    #[cfg(feature = "observe")]
    pub(super) fn durations(&self) -> [HistogramSnapshot; 4] {
        self.durations.each_ref().map(FixedHistogram::snapshot)
    }

    /// Returns the cells for the exports of the latencies, by [`OutcomeKind`].
    #[cfg(feature = "observe")]
    pub(super) fn export_cells(&self) -> [&ExportCell; 4] {
        self.durations.each_ref().map(FixedHistogram::export_cell)
    }

    /// Returns the numbers of calls that have begun, that have ended by [`OutcomeKind`], and that were rejected.
    pub(super) fn call_counts(&self) -> (u64, [u64; 4], u64) {
        // The ended calls are read before the begun ones, because each call begins before it ends. In the other order,
        // a call that begins and ends between the two reads would appear as ended only. The loads are `Relaxed`, so
        // this order is not guaranteed; readers therefore subtract with saturation.
        let ended = [0, 1, 2, 3].map(|kind: usize| self.ended[kind].load(Relaxed));
        let rejected = self.rejected.load(Relaxed);
        (self.begun.load(Relaxed), ended, rejected)
    }

    pub(super) fn counts(&self) -> MeterCounts {
        let (begun, [successes, failures, throttled, cancelled], rejected) = self.call_counts();
        let timed = self.timed.load(Relaxed);
        let average = self.took.load(Relaxed).checked_div(timed).map(Duration::from_nanos);
        let mut recent = self.recent.lock();
        let p99 = recent.percentile(0.99, Instant::now());
        MeterCounts { begun, successes, failures, throttled, cancelled, rejected, average, p99 }
    }
}

fn is_rejected(outcome: Outcome) -> bool {
    (outcome.kind(), outcome.reason()) == (OutcomeKind::Cancelled, Reason::Rejected)
}

impl Sealed for MeterLayer {}

impl Release for MeterLayer {
    fn release(&self, token: Token, outcome: Outcome) {
        if is_rejected(outcome) {
            // A rejection is not a latency of the upstream, so it is not timed.
            self.rejected.fetch_add(1, Relaxed);
            return;
        }
        if token.tag > 0 {
            self.record_latency(token.tag - 1, outcome);
        }
        self.ended[outcome.kind() as usize].fetch_add(1, Relaxed);
    }

    fn record_head(&self, token: &mut Token, so_far: Outcome) {
        // A server stack responds to a rejected call, so the rejection has a response head. The release of the permit
        // counts the rejection.
        if is_rejected(so_far) {
            return;
        }
        if token.tag > 0 {
            self.record_latency(token.tag - 1, so_far);
        }
        token.tag = 0;
    }

    fn release_at(&self) -> ReleaseAt {
        ReleaseAt::Body
    }
}

impl<Req> Policy<Req> for Arc<MeterLayer> {
    type StateRef = Self;
    type Pass = Token;
    type Wait = Ready<Result<Permit<Self>, Rejected>>;

    const LAYER: LayerKind = LayerKind::User;

    fn peek(&self) -> bool {
        true
    }

    fn admit(&self, _: &Req, _: impl Terms) -> Admit<Token, Self::Wait> {
        self.begun.fetch_add(1, Relaxed);
        // The tag is the time plus one, or 0 once the call has been timed. A meter times whole calls, whichever side
        // they wait for, so it does not use the clock of the token.
        Admit::Pass(Token::unmeasured(self.clock.now().saturating_add(1)))
    }

    fn permit(&self, token: Token) -> Permit<Self> {
        Permit::of(self, token)
    }
}

impl fmt::Debug for MeterLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MeterLayer").field("begun", &self.begun).finish_non_exhaustive()
    }
}

admission_service! {
    /// A service that counts its calls, the outermost service of a [`ClientStack`](super::client::ClientStack) or a
    /// [`ServerStack`](super::server::ServerStack).
    service Meter []
    future MeterFuture
    policy Arc<MeterLayer>
}

impl<S, R: Clone> Meter<S, Http, R> {
    pub(super) fn new(inner: S, meter: &Arc<MeterLayer>, reject: R) -> Self {
        let plan = Plan { policy: meter.clone(), protocol: Http, reject, fault: Fault::default() };
        Self { admission: plan.service(inner) }
    }
}
