//! The circuit breaker against a naive model: any schedule of calls, ends, pauses and orders by hand.
#![cfg(feature = "breaker")]

mod support;

use std::time::Duration;

use buttress::{CircuitBreaker, CircuitBreakerLayer, Trip, breaker::State, call::TrackedBody};
use http::{Request, Response};
use proptest::prelude::*;
use support::{Oops, Piece, ScriptBody, Strict, empty, request, status};
use tokio_test::{assert_ready, assert_ready_ok, task};
use tower::{Layer, ServiceExt, util::Oneshot};

#[derive(Clone, Copy, Debug)]
enum Step {
    Call,
    /// How the n-th of the calls under way ends; a streaming one ends as its body is dropped.
    End(usize, End),
    Advance(u64),
    ForceOpen,
    ForceClosed,
    Reset,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Success,
    Error,
    ServerError,
    Throttled,
    Cancel,
    /// Not an end: a good head, and a body that never comes to one.
    GoodHead,
}

#[derive(Clone, Copy, Debug)]
struct Config {
    failures: u32,
    probes: u16,
    open_ms: u64,
    lease_ms: u64,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    use End::*;
    let ends = prop::sample::select(vec![
        Success,
        Success,
        Success,
        Error,
        ServerError,
        Throttled,
        Cancel,
        GoodHead,
    ]);
    let step = prop_oneof![
        8 => Just(Step::Call),
        8 => (0..4usize, ends).prop_map(|(n, end)| Step::End(n, end)),
        4 => (1..60u64).prop_map(Step::Advance),
        1 => prop::sample::select(vec![Step::ForceOpen, Step::ForceClosed, Step::Reset]),
    ];
    prop::collection::vec(step, 1..80)
}

fn configs() -> impl Strategy<Value = Config> {
    (1..4u32, 1..4u16, 10..50u64, 10..90u64).prop_map(|(failures, probes, open_ms, lease_ms)| {
        Config { failures, probes, open_ms, lease_ms }
    })
}

// ===== The model =====

#[derive(Debug)]
struct Model {
    config: Config,
    now: u64,
    state: State,
    /// Which stay in a state this is.
    stay: usize,
    opened: u64,
    run: u32,
    open_until: u64,
    passed: usize,
    /// Number of the call, end of its lease, whether it has seen a good head.
    probes: Vec<(usize, u64, bool)>,
}

impl Model {
    fn to(&mut self, state: State) {
        (self.state, self.run, self.passed) = (state, 0, 0);
        self.stay += 1;
        self.probes.clear();
        if state == State::Open {
            self.opened += 1;
            self.open_until = self.now + self.config.open_ms;
        }
    }

    fn close_if_proven(&mut self) {
        if self.passed >= usize::from(self.config.probes) {
            self.to(State::Closed);
        }
    }

    /// Whether the call of this number goes.
    fn call(&mut self, number: usize) -> bool {
        if self.state == State::Open && self.now >= self.open_until {
            self.to(State::HalfOpen);
        }
        if self.state == State::HalfOpen {
            let now = self.now;
            let (over, under_way): (Vec<_>, _) =
                self.probes.iter().copied().partition(|probe| probe.1 <= now);
            if over.iter().any(|probe| !probe.2) {
                self.to(State::Open);
            } else {
                self.probes = under_way;
                self.passed += over.len();
                self.close_if_proven();
            }
        }
        match self.state {
            State::Closed | State::ForcedClosed => true,
            State::Open | State::ForcedOpen => false,
            State::HalfOpen => {
                let free = self.passed + self.probes.len() < usize::from(self.config.probes);
                if free {
                    self.probes.push((number, self.now + self.config.lease_ms, false));
                }
                free
            }
        }
    }

    fn end(&mut self, number: usize, stay: usize, end: End) {
        if stay != self.stay {
            return;
        }
        match self.state {
            State::Closed => match end {
                End::Success => self.run = 0,
                End::Error | End::ServerError => {
                    self.run += 1;
                    if self.run >= self.config.failures {
                        self.to(State::Open);
                    }
                }
                End::Throttled | End::Cancel | End::GoodHead => {}
            },
            State::HalfOpen => {
                let Some(at) = self.probes.iter().position(|probe| probe.0 == number) else {
                    return;
                };
                if end == End::GoodHead {
                    self.probes[at].2 = true;
                    return;
                }
                self.probes.remove(at);
                match end {
                    End::Success => {
                        self.passed += 1;
                        self.close_if_proven();
                    }
                    End::Cancel | End::GoodHead => {}
                    End::Error | End::ServerError | End::Throttled => self.to(State::Open),
                }
            }
            State::Open | State::ForcedOpen | State::ForcedClosed => {}
        }
    }

    fn state(&self) -> State {
        match self.state {
            State::Open if self.now >= self.open_until => State::HalfOpen,
            state => state,
        }
    }
}

// ===== The run =====

struct Call {
    number: usize,
    stay: usize,
    doing: Doing,
}

enum Doing {
    Asking(task::Spawn<Oneshot<CircuitBreaker<Strict>, Request<()>>>),
    Streaming { _body: Response<TrackedBody<ScriptBody>> },
}

async fn run(config: Config, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let layer = CircuitBreakerLayer::new(Trip::consecutive(config.failures))
        .half_open(config.probes)
        .open_for(Duration::from_millis(config.open_ms))
        .probe_lease(Duration::from_millis(config.lease_ms));
    let (inner, watch) = Strict::holding();
    let (handle, service) = (layer.handle(), layer.layer(inner));
    let mut model = Model {
        config,
        now: 0,
        state: State::Closed,
        stay: 0,
        opened: 0,
        run: 0,
        open_until: 0,
        passed: 0,
        probes: Vec::new(),
    };
    let mut calls: Vec<Call> = Vec::new();
    for step in steps {
        match step {
            Step::Call => {
                let number = watch.seen().calls;
                let mut call = task::spawn(service.clone().oneshot(request()));
                let goes = call.poll().is_pending();
                prop_assert_eq!(goes, model.call(number));
                prop_assert_eq!(goes, watch.seen().calls > number);
                if goes {
                    calls.push(Call { number, stay: model.stay, doing: Doing::Asking(call) });
                }
            }
            Step::End(n, end) if !calls.is_empty() => {
                let mut call = calls.remove(n % calls.len());
                let Doing::Asking(asking) = &mut call.doing else {
                    // A good answer that was not read to its end.
                    model.end(call.number, call.stay, End::Success);
                    continue;
                };
                model.end(call.number, call.stay, end);
                match end {
                    End::Cancel => {}
                    End::Error => {
                        watch.end(call.number, Err(Oops("down")));
                        prop_assert!(assert_ready!(asking.poll()).is_err());
                    }
                    End::GoodHead => {
                        let stuck = Response::new(ScriptBody::new([Piece::Stuck]));
                        watch.end(call.number, Ok(stuck));
                        call.doing = Doing::Streaming { _body: assert_ready_ok!(asking.poll()) };
                        calls.push(call);
                    }
                    End::Success | End::ServerError | End::Throttled => {
                        let answer = match end {
                            End::ServerError => status(503),
                            End::Throttled => status(429),
                            _ => empty(),
                        };
                        watch.end(call.number, Ok(answer));
                        assert_ready_ok!(asking.poll());
                    }
                }
            }
            Step::End(..) => {}
            Step::Advance(ms) => {
                tokio::time::advance(Duration::from_millis(ms)).await;
                model.now += ms;
            }
            Step::ForceOpen => {
                handle.force_open();
                model.to(State::ForcedOpen);
            }
            Step::ForceClosed => {
                handle.force_closed();
                model.to(State::ForcedClosed);
            }
            Step::Reset => {
                handle.reset();
                model.to(State::Closed);
            }
        }
        let seen = handle.snapshot();
        prop_assert_eq!(seen.state, model.state());
        prop_assert_eq!(seen.probes, model.probes.len());
        prop_assert!(seen.probes <= usize::from(config.probes));
        prop_assert_eq!(seen.opened, model.opened);
        if model.state == State::Closed {
            prop_assert_eq!(seen.seen.consecutive_failures, model.run);
        }
    }

    // Whatever happened: nothing is lost, and good probes close the circuit.
    calls.clear();
    prop_assert_eq!((handle.snapshot().probes, watch.seen().in_flight), (0, 0));
    if matches!(handle.state(), State::ForcedOpen | State::ForcedClosed) {
        handle.reset();
    }
    tokio::time::advance(Duration::from_millis(config.open_ms)).await;
    for _ in 0..config.probes {
        watch.script([support::Then::Answer(empty())]);
        prop_assert!(service.clone().oneshot(request()).await.is_ok());
    }
    prop_assert_eq!(handle.state(), State::Closed);
    prop_assert_eq!(watch.seen().without_ready, 0);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

    #[test]
    fn any_schedule_does_what_the_model_does(config in configs(), steps in steps()) {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        runtime.unwrap().block_on(run(config, steps))?;
    }
}
