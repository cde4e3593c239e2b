//! Layers, services and handles, created, cloned and dropped in random order while probes run.

use std::{
    future::pending,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use buttress::{
    BoxError, Health, HealthProbe, HealthProbeLayer, Rejected,
    classify::PerResponse,
    health::{CallProbe, HealthProbeHandle, ProbeState},
};
use proptest::prelude::*;
use tokio::time::sleep;
use tower::{Layer, Service, ServiceExt};

use crate::support::{alive_tasks, settle};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    Well,
    Fails,
    Hangs,
    Panics,
    Slow,
}

#[derive(Clone, Debug)]
enum Step {
    CloneLayer,
    Wrap,
    CloneService,
    MakeHandle,
    Drop(usize),
    Becomes(Mode),
    Call,
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    use Mode::{Fails, Hangs, Panics, Slow, Well};
    prop_oneof![
        1 => Just(Step::CloneLayer),
        2 => Just(Step::Wrap),
        1 => Just(Step::CloneService),
        1 => Just(Step::MakeHandle),
        4 => any::<usize>().prop_map(Step::Drop),
        2 => prop::sample::select(vec![Well, Fails, Hangs, Panics, Slow]).prop_map(Step::Becomes),
        2 => Just(Step::Call),
        4 => (0u64..12_000).prop_map(Step::Wait),
    ]
}

/// Counts the probes in flight. The request 1 is a call, and the request 0 is a probe.
#[derive(Clone)]
struct Upstream {
    mode: Arc<Mutex<Mode>>,
    now: Arc<AtomicUsize>,
}

struct UnderWay(Arc<AtomicUsize>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

impl Service<u8> for Upstream {
    type Response = ();
    type Error = BoxError;
    type Future = std::pin::Pin<Box<dyn Future<Output = Result<(), BoxError>> + Send>>;

    fn poll_ready(
        &mut self,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Result<(), BoxError>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, probe_or_call: u8) -> Self::Future {
        if probe_or_call == 1 {
            return Box::pin(async { Ok(()) });
        }
        assert_eq!(self.now.fetch_add(1, SeqCst), 0, "two probes at once");
        let under_way = UnderWay(self.now.clone());
        let mode = *self.mode.lock().unwrap();
        Box::pin(async move {
            let _under_way = under_way;
            match mode {
                Mode::Well => Ok(()),
                Mode::Fails => Err("fails".into()),
                Mode::Hangs => pending().await,
                Mode::Panics => panic!("scripted panic"),
                Mode::Slow => {
                    sleep(Duration::from_millis(700)).await;
                    Ok(())
                }
            }
        })
    }
}

type Probe = HealthProbeLayer<CallProbe<fn() -> u8>, PerResponse>;

/// An owner of the state of the probe.
enum Owner {
    Layer(Probe),
    Service(HealthProbe<Upstream, PerResponse>),
    Handle(HealthProbeHandle),
}

async fn live(steps: Vec<Step>) {
    let upstream = Upstream { mode: Arc::new(Mutex::new(Mode::Well)), now: Arc::default() };
    let health = Health::new();
    let probe: Probe = HealthProbeLayer::new((|| 0) as fn() -> u8)
        .every(Duration::from_secs(3))
        .thresholds(2, 2)
        .report_to(&health, "upstream");
    let (mut owners, mut wrapped) = (vec![Owner::Layer(probe)], false);
    for step in steps {
        let layer = owners.iter().find_map(|owner| match owner {
            Owner::Layer(layer) => Some(layer.clone()),
            _ => None,
        });
        let service = owners.iter().find_map(|owner| match owner {
            Owner::Service(service) => Some(service.clone()),
            _ => None,
        });
        match step {
            Step::CloneLayer => owners.extend(layer.map(Owner::Layer)),
            Step::Wrap => {
                wrapped |= layer.is_some();
                owners.extend(layer.map(|layer| Owner::Service(layer.layer(upstream.clone()))));
            }
            Step::CloneService => owners.extend(service.map(Owner::Service)),
            Step::MakeHandle => owners.extend(layer.map(|layer| Owner::Handle(layer.handle()))),
            Step::Drop(nth) if !owners.is_empty() => {
                drop((layer, service));
                let nth = nth % owners.len();
                owners.swap_remove(nth);
            }
            Step::Drop(_) => {}
            Step::Becomes(mode) => *upstream.mode.lock().unwrap() = mode,
            Step::Call => {
                let Some(service) = service else { continue };
                let down = health.check("upstream") == Some(buttress::health::CheckState::Fail);
                let answer = service.oneshot(1).await;
                let refused = answer.is_err_and(|error| Rejected::find(&*error).is_some());
                assert_eq!(
                    refused, down,
                    "calls are rejected exactly while the registry reports a failure"
                );
            }
            Step::Wait(millis) => sleep(Duration::from_millis(millis)).await,
        }
        settle().await;
        let owned = !owners.is_empty();
        assert_eq!(alive_tasks(), usize::from(owned && wrapped));
        assert_eq!(health.check("upstream").is_some(), owned);
        assert!(owned || upstream.now.load(SeqCst) == 0, "a probe is in flight without an owner");
        for owner in &owners {
            let Owner::Handle(handle) = owner else { continue };
            let seen = handle.snapshot();
            assert!(seen.consecutive_failures == 0 || seen.consecutive_successes == 0);
            assert!(seen.state != ProbeState::Unknown || seen.consecutive_successes == 0);
        }
    }
    drop(owners);
    settle().await;
    assert_eq!((alive_tasks(), upstream.now.load(SeqCst), health.checks().len()), (0, 0, 0));
    assert_eq!(Arc::strong_count(&upstream.now), 1, "a clone of the upstream is left");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_gate_has_one_prober_for_any_owners(steps in prop::collection::vec(step(), 1..60)) {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        runtime.enable_time().start_paused(true).build().unwrap().block_on(live(steps));
    }
}
