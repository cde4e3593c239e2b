//! Checks that the registry runs periodically.

use std::{
    future::pending,
    sync::{
        Arc, Mutex,
        atomic::{
            AtomicBool, AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
    },
    time::Duration,
};

use buttress::{
    CircuitBreakerLayer, ConcurrencyLimitLayer, Health, HealthProbeLayer, Outcome, Trip,
    health::{Check, CheckState, HealthStatus},
};
use proptest::prelude::*;
use tokio::time::{Instant, sleep};
use tower::{Layer, Service, ServiceExt, service_fn};

use crate::support::{alive_tasks, settle, within_an_hour};

// ===== A scripted dependency =====

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    Well,
    Fails,
    Hangs,
    Panics,
    PanicsWhenDropped,
    Slow(Duration),
}

#[derive(Clone)]
struct Dependency(Arc<Inner>);

struct Inner {
    mode: Mutex<Mode>,
    asked: AtomicUsize,
    now: AtomicUsize,
    peak: AtomicUsize,
}

struct Asked(Dependency);

impl Drop for Asked {
    fn drop(&mut self) {
        self.0.0.now.fetch_sub(1, SeqCst);
        let is_active = *self.0.0.mode.lock().unwrap() == Mode::PanicsWhenDropped;
        assert!(!is_active, "scripted panic");
    }
}

impl Dependency {
    fn new() -> Self {
        Self(Arc::new(Inner {
            mode: Mutex::new(Mode::Well),
            asked: AtomicUsize::new(0),
            now: AtomicUsize::new(0),
            peak: AtomicUsize::new(0),
        }))
    }

    fn will(&self, mode: Mode) {
        *self.0.mode.lock().unwrap() = mode;
    }

    fn asked(&self) -> usize {
        self.0.asked.load(SeqCst)
    }

    async fn ask(self) -> Result<(), String> {
        let inner = &self.0;
        inner.asked.fetch_add(1, SeqCst);
        inner.peak.fetch_max(inner.now.fetch_add(1, SeqCst) + 1, SeqCst);
        let _asked = Asked(self.clone());
        let mode = *inner.mode.lock().unwrap();
        match mode {
            Mode::Well | Mode::PanicsWhenDropped => Ok(()),
            Mode::Fails => Err("connection refused".to_owned()),
            Mode::Hangs => pending().await,
            Mode::Panics => panic!("scripted panic"),
            Mode::Slow(time) => {
                sleep(time).await;
                Ok(())
            }
        }
    }

    /// Returns a check that runs at 0 s, 5 s, 10 s, …, with thresholds of 1.
    fn check(&self, name: &str) -> Check {
        let dependency = self.clone();
        Check::new(name, move || dependency.clone().ask()).jitter(0.0).thresholds(1, 1)
    }
}

const EVERY: Duration = Duration::from_secs(5);

// ===== Runs of a check =====

#[tokio::test(start_paused = true)]
async fn the_first_run_is_at_once_and_later_runs_follow_the_schedule() {
    let (health, db) = (Health::new(), Dependency::new());
    health.add(db.check("db")).unwrap();
    assert_eq!(health.check("db"), Some(CheckState::Unknown));
    let began = Instant::now();
    assert!(within_an_hour(health.changed()).await);
    assert_eq!(began.elapsed(), Duration::ZERO);
    // Queries of the registry do not run the check.
    for _ in 0..100 {
        assert!(health.is_ready());
    }
    sleep(3 * EVERY + EVERY / 2).await;
    assert_eq!(db.asked(), 4);
}

#[tokio::test(start_paused = true)]
async fn a_failed_run_has_its_reason_its_age_and_its_duration() {
    for (mode, reason, took) in [
        (Mode::Fails, "connection refused", 0),
        (Mode::Hangs, "no result within 1s", 1000),
        (Mode::Panics, "panicked", 0),
        (Mode::PanicsWhenDropped, "panicked", 0),
        (Mode::Slow(Duration::from_millis(1001)), "no result within 1s", 1000),
    ] {
        let (health, db) = (Health::new(), Dependency::new());
        db.will(mode);
        health.add(db.check("db")).unwrap();
        assert!(!within_an_hour(health.changed()).await, "{mode:?}");
        sleep(Duration::from_secs(2)).await;
        let seen = health.snapshot().remove(0);
        assert_eq!((seen.state, seen.healthy), (CheckState::Fail, Some(false)), "{mode:?}");
        assert_eq!(seen.reason.as_deref(), Some(reason), "{mode:?}");
        assert_eq!(seen.age, Some(Duration::from_secs(2)), "{mode:?}");
        assert_eq!(seen.took, Some(Duration::from_millis(took)), "{mode:?}");
        assert_eq!(db.0.now.load(SeqCst), 0, "a hanging run is dropped: {mode:?}");
        // The check continues after each kind of failure.
        db.will(Mode::Slow(Duration::from_millis(20)));
        assert!(within_an_hour(health.changed()).await, "{mode:?}");
        let seen = health.snapshot().remove(0);
        assert_eq!((seen.reason, seen.took), (None, Some(Duration::from_millis(20))), "{mode:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_closure_that_panics_is_a_failed_run() {
    let health = Health::new();
    let calm = Arc::new(AtomicBool::new(false));
    let when = calm.clone();
    let ask = move || {
        assert!(when.load(SeqCst), "scripted panic");
        async { Ok::<(), String>(()) }
    };
    health.add(Check::new("db", ask).thresholds(1, 1)).unwrap();
    assert!(!within_an_hour(health.changed()).await);
    calm.store(true, SeqCst);
    assert!(within_an_hour(health.changed()).await);
}

#[tokio::test(start_paused = true)]
async fn runs_never_overlap_when_they_are_slower_than_their_interval() {
    let (health, db) = (Health::new(), Dependency::new());
    db.will(Mode::Slow(Duration::from_secs(1)));
    let check = db.check("db").every(Duration::from_millis(100)).timeout(Duration::from_secs(9));
    health.add(check).unwrap();
    sleep(Duration::from_millis(10_500)).await;
    assert_eq!((db.0.peak.load(SeqCst), db.asked()), (1, 10));
    assert!(health.is_ready());
    // A hanging run is dropped before the next one begins.
    db.will(Mode::Hangs);
    sleep(Duration::from_secs(60)).await;
    assert_eq!(db.0.peak.load(SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn runs_are_more_frequent_while_down() {
    let (health, db) = (Health::new(), Dependency::new());
    health.add(db.check("db").thresholds(2, 3).every_while_down(Duration::from_secs(1))).unwrap();
    let began = Instant::now();
    assert!(within_an_hour(health.changed()).await);
    db.will(Mode::Fails);
    // The check fails at 5 s, 6 s and 7 s.
    assert!(!within_an_hour(health.changed()).await);
    assert_eq!(began.elapsed(), Duration::from_secs(7));
    db.will(Mode::Well);
    assert!(within_an_hour(health.changed()).await);
    assert_eq!(began.elapsed(), Duration::from_secs(9));
    let asked = db.asked();
    sleep(EVERY - Duration::from_millis(1)).await;
    assert_eq!(db.asked(), asked);
}

#[tokio::test(start_paused = true)]
async fn checks_do_not_wait_for_each_other() {
    let health = Health::new();
    let (hung, well) = (Dependency::new(), Dependency::new());
    hung.will(Mode::Hangs);
    health.add(hung.check("hung").timeout(Duration::from_secs(3600))).unwrap();
    health.add(well.check("well").every(Duration::from_millis(20))).unwrap();
    sleep(Duration::from_millis(1500)).await;
    assert!(well.asked() >= 70);
    assert_eq!(health.check("well"), Some(CheckState::Pass));
    assert_eq!(health.check("hung"), Some(CheckState::Unknown));
}

// ===== Effect on readiness =====

#[tokio::test(start_paused = true)]
async fn a_failed_degrading_check_leaves_the_process_ready() {
    let health = Health::new();
    let (db, search) = (Dependency::new(), Dependency::new());
    search.will(Mode::Fails);
    health.add(db.check("db")).unwrap();
    health.add(search.check("search").degrading()).unwrap();
    settle().await;
    assert_eq!((health.status(), health.is_ready()), (HealthStatus::Warn, true));
    assert_eq!(health.check("search"), Some(CheckState::Fail));
    db.will(Mode::Fails);
    assert!(!within_an_hour(health.changed()).await);
    assert_eq!(health.status(), HealthStatus::Fail);
}

#[tokio::test(start_paused = true)]
async fn handles_of_breakers_limits_and_probes_are_checks() {
    let health = Health::new();
    let breaker = CircuitBreakerLayer::new(Trip::consecutive(2)).open_for(Duration::from_secs(30));
    let limit = ConcurrencyLimitLayer::new(1).per_response();
    let mut busy = limit.layer(service_fn(|()| pending::<Result<(), buttress::BoxError>>()));
    let probe = HealthProbeLayer::new(|| ()).thresholds(1, 1);
    let alive = Arc::new(AtomicBool::new(true));
    let here = alive.clone();
    let upstream = service_fn(move |()| {
        let alive = here.load(SeqCst);
        async move { if alive { Ok(()) } else { Err(buttress::BoxError::from("gone")) } }
    });
    let _probed = probe.layer(upstream);
    let own = Arc::new(AtomicUsize::new(0));
    let waiting = own.clone();
    let watch =
        |name, what| Check::watch(name, what).every(Duration::from_secs(1)).thresholds(1, 1);
    let every = Duration::from_secs(1);
    health.add(watch("breaker", breaker.handle())).unwrap();
    health.add(Check::watch("limit", limit.handle()).every(every).thresholds(1, 1)).unwrap();
    health.add(Check::watch("probe", probe.handle()).every(every).thresholds(1, 1)).unwrap();
    let closure = move || match waiting.load(SeqCst) {
        0..10 => Ok(()),
        n => Err(format!("{n} are waiting")),
    };
    health.add(Check::watch("own", closure).every(every).thresholds(1, 1)).unwrap();

    let says = |name: &str| {
        let seen = health.snapshot().into_iter().find(|check| check.name == name).unwrap();
        (seen.state, seen.reason)
    };
    let a_while = || sleep(Duration::from_millis(1200));
    a_while().await;
    assert!(health.is_ready(), "{:?}", health.snapshot());

    breaker.handle().record(Outcome::failure());
    breaker.handle().record(Outcome::failure());
    a_while().await;
    assert_eq!(says("breaker"), (CheckState::Fail, Some("circuit is open".into())));
    sleep(Duration::from_secs(30)).await;
    // The check of a half-open circuit passes, because the circuit cannot close without traffic.
    assert_eq!(says("breaker").0, CheckState::Pass);

    let call = tokio::spawn(busy.ready().await.unwrap().call(()));
    a_while().await;
    assert_eq!(says("limit"), (CheckState::Fail, Some("1 of 1 calls in flight".into())));
    call.abort();
    a_while().await;
    assert_eq!(says("limit").0, CheckState::Pass);

    alive.store(false, SeqCst);
    own.store(12, SeqCst);
    sleep(Duration::from_secs(8)).await;
    assert_eq!(says("probe"), (CheckState::Fail, Some("health probe is down".into())));
    assert_eq!(says("own"), (CheckState::Fail, Some("12 are waiting".into())));
}

// ===== Lifetime =====

#[tokio::test(start_paused = true)]
async fn checks_end_with_the_last_handle_and_leak_no_task() {
    for mode in [Mode::Well, Mode::Hangs] {
        // In the first case the tasks sleep. In the second case a run is in progress.
        let (health, db) = (Health::new(), Dependency::new());
        db.will(mode);
        let timeout = Duration::from_secs(3600);
        health.add(db.check("db").timeout(timeout)).unwrap();
        health.add(db.check("other").timeout(timeout)).unwrap();
        let (endpoints, service) = (health.endpoints(), health.service());
        settle().await;
        assert_eq!(alive_tasks(), 2);
        drop((health, endpoints));
        settle().await;
        assert_eq!(alive_tasks(), 2, "the service keeps the tasks: {mode:?}");
        drop(service);
        settle().await;
        assert_eq!((alive_tasks(), Arc::strong_count(&db.0)), (0, 1), "{mode:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_removed_check_is_not_run_any_more() {
    let (health, db) = (Health::new(), Dependency::new());
    db.will(Mode::Hangs);
    health.add(db.check("db")).unwrap();
    settle().await;
    assert!(health.remove("db") && !health.remove("db"));
    assert!(within_an_hour(health.changed()).await, "the registry is ready without the check");
    settle().await;
    assert_eq!((alive_tasks(), Arc::strong_count(&db.0)), (0, 1));
    health.add(db.check("db")).unwrap();
}

#[test]
fn a_check_whose_runtime_has_ended_has_failed() {
    let (health, db) = (Health::new(), Dependency::new());
    assert_eq!(health.add(db.check("db")).unwrap_err().field, "check");
    let runtime = || {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.enable_time().start_paused(true).build().unwrap()
    };
    runtime().block_on(async {
        health.add(db.check("db")).unwrap();
        settle().await;
        assert!(health.is_ready());
    });
    assert!(!health.is_ready());
    runtime().block_on(async {
        sleep(Duration::from_secs(60)).await;
        let reason = health.snapshot().remove(0).reason;
        assert_eq!(reason.as_deref(), Some("its task has ended"));
    });
    // A check in the next runtime can have the same name.
    runtime().block_on(async {
        health.add(db.check("db")).unwrap();
        settle().await;
        assert!(health.is_ready());
    });
    // In a runtime without timers the check fails, and no panic reaches the caller.
    let without_timers = tokio::runtime::Builder::new_current_thread().build().unwrap();
    without_timers.block_on(async {
        health.add(db.check("other")).unwrap();
        settle().await;
        assert!(tokio_test::task::spawn(health.changed()).poll().is_pending());
    });
    assert_eq!(health.check("other"), Some(CheckState::Fail));
}

#[tokio::test(start_paused = true)]
async fn invalid_setting_is_a_typed_error() {
    let (health, db) = (Health::new(), Dependency::new());
    let _taken = health.reporter("taken").unwrap();
    for (check, field) in [
        (db.check("db").every(Duration::ZERO), "every"),
        (db.check("db").every_while_down(Duration::ZERO), "every_while_down"),
        (db.check("db").timeout(Duration::ZERO), "timeout"),
        (db.check("db").jitter(f64::NAN), "jitter"),
        (db.check("db").thresholds(0, 1), "thresholds.rise"),
        (db.check("db").thresholds(1, 0).every(Duration::ZERO), "thresholds.fall"),
        (db.check("taken"), "check.name"),
        (db.check("a b"), "check.name"),
    ] {
        assert_eq!(health.add(check).unwrap_err().field, field);
    }
    settle().await;
    assert_eq!((alive_tasks(), db.asked()), (0, 0));
    let extreme = db.check("db").every(Duration::MAX).timeout(Duration::MAX).jitter(1.0);
    health.add(extreme).unwrap();
    settle().await;
    assert_eq!(health.check("db"), Some(CheckState::Pass));
}

// ===== Flapping =====

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// A run of the check fails with a probability of 30 %. Before each change of readiness, the number of equal
    /// results in a row is at least the threshold of this change.
    #[test]
    fn a_flapping_dependency_changes_the_state_as_rarely_as_the_thresholds_demand(
        rise in 1u32..5,
        fall in 1u32..5,
        looks in prop::collection::vec(prop::bool::weighted(0.7), 200),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            let health = Health::new();
            let next = Arc::new(AtomicUsize::new(0));
            let (told, at) = (looks.clone(), next.clone());
            let ask = move || {
                let passes = told.get(at.fetch_add(1, Relaxed)).copied().unwrap_or(true);
                async move { if passes { Ok(()) } else { Err("flaps") } }
            };
            health.add(Check::new("db", ask).jitter(0.0).thresholds(rise, fall)).unwrap();
            let (mut flips, mut since) = (Vec::new(), 0);
            let mut ready = health.is_ready();
            for looked in 1..=looks.len() {
                settle().await;
                assert_eq!(next.load(Relaxed), looked);
                if health.is_ready() != ready {
                    ready = !ready;
                    let least = if ready { rise } else { fall } as usize;
                    let run = &looks[looked.saturating_sub(least)..looked];
                    // Without an earlier result, one success suffices.
                    assert!(flips.is_empty() && ready || run.len() == least && looked - since >= least);
                    assert!(flips.is_empty() || run.iter().all(|passed| *passed == ready));
                    flips.push(looked);
                    since = looked;
                }
                sleep(EVERY).await;
            }
            // The number of changes without thresholds.
            let bare = looks.windows(2).filter(|two| two[0] != two[1]).count() + 1;
            assert!(flips.len() <= bare.max(2));
            if rise > 1 || fall > 1 {
                assert!(flips.len() <= 2 * looks.len() / (rise + fall) as usize + 1);
            }
        });
    }
}
