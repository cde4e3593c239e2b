//! The circuit breaker against a naive model: any schedule of calls, ends, pauses and orders by hand.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};

use super::model::{Config, End, Model, Rule};
use crate::support::{Oops, Piece, ScriptBody, Strict, Then, empty, request, status};
use buttress::{
    CircuitBreaker, CircuitBreakerLayer, Outcome,
    breaker::{Isolation, State},
    call::TrackedBody,
};
use http::{Request, Response};
use proptest::prelude::*;
use tokio_test::{assert_ready, assert_ready_ok, task};
use tower::{Layer, ServiceExt, util::Oneshot};

#[derive(Clone, Copy, Debug)]
enum Step {
    Call,
    /// A call that panics.
    Panic,
    /// How the n-th of the calls under way ends; a streaming one ends as its body is dropped.
    End(usize, End),
    Advance(u64),
    Force(State),
    Isolate,
    /// The oldest isolation ends.
    Release,
    Record(End),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    use End::*;
    let ends =
        [Success, Success, Success, Error, ServerError, Throttled, Cancel, GoodHead].to_vec();
    let forced = [State::ForcedOpen, State::ForcedClosed, State::HalfOpen, State::Closed].to_vec();
    let step = prop_oneof![
        32 => Just(Step::Call),
        1 => Just(Step::Panic),
        32 => (0..4usize, prop::sample::select(ends)).prop_map(|(n, end)| Step::End(n, end)),
        16 => (1..60u64).prop_map(Step::Advance),
        // A clock that jumps: an hour, a year.
        1 => prop::sample::select(vec![3_600_000, 31_536_000_000]).prop_map(Step::Advance),
        2 => prop::sample::select(forced).prop_map(Step::Force),
        1 => Just(Step::Isolate),
        3 => Just(Step::Release),
        3 => prop::sample::select(vec![Success, Error, Throttled, Cancel]).prop_map(Step::Record),
    ];
    prop::collection::vec(step, 1..50)
}

fn consecutive() -> impl Strategy<Value = Rule> {
    (1..4u32).prop_map(Rule::Consecutive)
}

fn failed() -> impl Strategy<Value = Rule> {
    (1..=10u32, 1..12u32, 1..12u32).prop_map(|(tenths, over, min)| Rule::Failed {
        tenths,
        over,
        min: min.min(over),
    })
}

fn slow() -> impl Strategy<Value = Rule> {
    (1..=10u32, 1..12u32, 1..60u64).prop_map(|(tenths, over, ms)| Rule::Slow { tenths, over, ms })
}

fn configs(rules: impl Strategy<Value = Vec<Rule>>) -> impl Strategy<Value = Config> {
    let probes = (1..4u16, 1..4u16).prop_map(|(a, b)| (a.min(b), a.max(b)));
    let outside = prop::bool::weighted(0.1);
    (rules, probes, 10..50u64, 10..90u64, any::<bool>(), outside).prop_map(
        |(rules, (needed, probes), open_ms, lease_ms, backs_off, outside)| Config {
            rules,
            needed,
            probes,
            open_ms,
            lease_ms,
            backs_off,
            outside,
        },
    )
}

// ===== The run =====

struct Call {
    number: usize,
    stay: usize,
    began: u64,
    head_took: Option<u64>,
    doing: Doing,
}

enum Doing {
    Asking(task::Spawn<Oneshot<CircuitBreaker<Strict>, Request<()>>>),
    Streaming { _body: Box<Response<TrackedBody<ScriptBody>>> },
}

async fn run(config: Config, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let layer: CircuitBreakerLayer = config.layer();
    let (inner, watch) = Strict::holding();
    let (handle, service) = (layer.handle(), layer.layer(inner));
    let mut model = Model::new(config.clone());
    let mut calls: Vec<Call> = Vec::new();
    let mut isolations: Vec<Isolation> = Vec::new();
    for step in steps {
        match step {
            Step::Call => {
                let number = watch.seen().calls;
                let mut call = task::spawn(service.clone().oneshot(request()));
                let goes = call.poll().is_pending();
                prop_assert_eq!(goes, model.call(number));
                prop_assert_eq!(goes, watch.seen().calls > number);
                if goes {
                    let (stay, began, doing) = (model.stay, model.now, Doing::Asking(call));
                    calls.push(Call { number, stay, began, head_took: None, doing });
                }
            }
            Step::Panic => {
                let number = watch.seen().calls;
                watch.script([Then::PanicInPoll]);
                let mut call = task::spawn(service.clone().oneshot(request()));
                let panicked = catch_unwind(AssertUnwindSafe(|| call.poll().is_pending())).is_err();
                drop(call);
                watch.unscript();
                prop_assert_eq!(panicked, model.call(number));
                if panicked {
                    model.end(number, model.stay, End::Error, 0);
                }
            }
            Step::End(n, end) if !calls.is_empty() => {
                let mut call = calls.remove(n % calls.len());
                let took = call.head_took.unwrap_or(model.now - call.began);
                let Doing::Asking(asking) = &mut call.doing else {
                    // A good answer that was not read to its end.
                    model.end(call.number, call.stay, End::Success, took);
                    continue;
                };
                model.end(call.number, call.stay, end, took);
                match end {
                    End::Cancel => {}
                    End::Error => {
                        watch.end(call.number, Err(Oops("down")));
                        prop_assert!(assert_ready!(asking.poll()).is_err());
                    }
                    End::GoodHead => {
                        let stuck = Response::new(ScriptBody::new([Piece::Stuck]));
                        watch.end(call.number, Ok(stuck));
                        let answer = assert_ready_ok!(asking.poll());
                        call.doing = Doing::Streaming { _body: Box::new(answer) };
                        call.head_took = Some(took);
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
            Step::Force(to) => {
                match to {
                    State::ForcedOpen => handle.force_open(),
                    State::ForcedClosed => handle.force_closed(),
                    State::HalfOpen => handle.half_open(),
                    _ => handle.reset(),
                }
                model.force(to);
            }
            Step::Isolate => {
                isolations.push(handle.isolate());
                model.isolations += 1;
            }
            Step::Release if !isolations.is_empty() => {
                drop(isolations.remove(0));
                model.isolations -= 1;
            }
            Step::Release => {}
            Step::Record(end) => {
                handle.record(match end {
                    End::Success => Outcome::success(),
                    End::Throttled => Outcome::throttled(),
                    End::Cancel => Outcome::cancelled(),
                    _ => Outcome::failure(),
                });
                model.told(end);
            }
        }
        let seen = handle.snapshot();
        prop_assert_eq!(seen.state, model.state());
        prop_assert_eq!(handle.state(), model.state());
        prop_assert_eq!(seen.probes, model.probes.len());
        prop_assert!(seen.probes <= usize::from(config.probes));
        prop_assert_eq!((seen.opened, seen.isolations), (model.opened, model.isolations));
        if seen.state == State::Closed {
            prop_assert_eq!(seen.seen.consecutive_failures, model.run);
            let seen = [seen.seen.window_calls, seen.seen.window_failures, seen.seen.window_slow];
            prop_assert_eq!(seen, model.windows());
        }
    }

    // Whatever happened: nothing is lost, and good probes close the circuit.
    calls.clear();
    isolations.clear();
    prop_assert_eq!((handle.snapshot().probes, watch.seen().in_flight), (0, 0));
    if matches!(handle.state(), State::ForcedOpen | State::ForcedClosed) {
        handle.reset();
    }
    tokio::time::advance(Duration::from_millis(config.open_ms * 4)).await;
    for _ in 0..config.probes {
        if config.outside {
            handle.record(Outcome::success());
            continue;
        }
        watch.script([Then::Answer(empty())]);
        prop_assert!(service.clone().oneshot(request()).await.is_ok());
    }
    prop_assert_eq!(handle.state(), State::Closed);
    prop_assert_eq!(watch.seen().without_ready, 0);
    Ok(())
}

fn paused(config: Config, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.unwrap().block_on(run(config, steps))
}

// 10,000 in all, cut so that they run beside each other.
proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2500) })]

    #[test]
    fn any_schedule_does_what_the_model_does(
        config in configs(consecutive().prop_map(|rule| vec![rule])), steps in steps(),
    ) {
        paused(config, steps)?;
    }

    #[test]
    fn any_schedule_over_a_window_of_calls(
        config in configs(failed().prop_map(|rule| vec![rule])), steps in steps(),
    ) {
        paused(config, steps)?;
    }

    #[test]
    fn any_schedule_of_slow_calls(
        config in configs((slow(), consecutive()).prop_map(|(slow, run)| vec![run, slow])),
        steps in steps(),
    ) {
        paused(config, steps)?;
    }

    #[test]
    fn any_schedule_under_many_rules(
        config in configs(prop::collection::vec(prop_oneof![consecutive(), failed(), slow()], 2..5)),
        steps in steps(),
    ) {
        paused(config, steps)?;
    }
}
