//! The circuit breaker against a naive model: any schedule of calls, ends, pauses and handle operations.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};

use buttress::{
    CircuitBreaker, CircuitBreakerLayer, Outcome,
    breaker::{CircuitState, Isolation},
    permit::TrackedBody,
};
use http::{Request, Response};
use proptest::prelude::*;
use tokio_test::{assert_ready, assert_ready_ok, task};
use tower::{Layer, ServiceExt, util::Oneshot};

use super::model::{Config, End, Goes, Model, Rule};
use crate::support::{Oops, Piece, ScriptBody, Strict, Then, empty, request, status};

#[derive(Clone, Copy, Debug)]
enum Step {
    Call,
    /// A call that panics.
    Panic,
    /// Ends the n-th call in flight. The end of a streaming call is the drop of its body.
    End(usize, End),
    Advance(u64),
    Force(CircuitState),
    Isolate,
    /// Ends the oldest isolation.
    Release,
    Record(End),
    Shadow(bool),
    /// `Take` takes a snapshot, `Restore` restores the last one.
    Take,
    Restore,
    /// `Adjust` changes the thresholds, `Wait` the open time.
    Adjust(u32),
    Wait(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    use End::*;
    let ends =
        [Success, Success, Success, Error, ServerError, Throttled, Cancel, GoodHead].to_vec();
    let forced = [
        CircuitState::ForcedOpen,
        CircuitState::ForcedClosed,
        CircuitState::HalfOpen,
        CircuitState::Closed,
    ]
    .to_vec();
    let step = prop_oneof![
        32 => Just(Step::Call),
        1 => Just(Step::Panic),
        32 => (0..4usize, prop::sample::select(ends)).prop_map(|(n, end)| Step::End(n, end)),
        16 => (1..60u64).prop_map(Step::Advance),
        // The clock jumps by an hour or by a year.
        1 => prop::sample::select(vec![3_600_000, 31_536_000_000]).prop_map(Step::Advance),
        2 => prop::sample::select(forced).prop_map(Step::Force),
        1 => Just(Step::Isolate),
        3 => Just(Step::Release),
        3 => prop::sample::select(vec![Success, Error, Throttled, Cancel]).prop_map(Step::Record),
        2 => any::<bool>().prop_map(Step::Shadow),
        1 => Just(Step::Take),
        1 => Just(Step::Restore),
        1 => (0..1000u32).prop_map(Step::Adjust),
        1 => (10..50u64).prop_map(Step::Wait),
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

fn within() -> impl Strategy<Value = Rule> {
    (1..=10u32, 1..12u64, 1..12u32).prop_map(|(tenths, stretch, min)| Rule::Within {
        tenths,
        stretch,
        min,
    })
}

fn configs(rules: impl Strategy<Value = Vec<Rule>>) -> impl Strategy<Value = Config> {
    let probes = (1..4u16, 1..4u16).prop_map(|(a, b)| (a.min(b), a.max(b)));
    let outside = prop::bool::weighted(0.1);
    let ramp = prop_oneof![3 => Just(0), 1 => 1..200u64];
    let count_cancelled = prop::option::of(1..60u64);
    let flags = (any::<bool>(), outside);
    (rules, probes, 10..50u64, 10..90u64, flags, ramp, count_cancelled).prop_map(
        |(rules, (needed, probes), open_ms, lease_ms, flags, ramp_ms, count_cancelled_ms)| Config {
            rules,
            needed,
            probes,
            open_ms,
            lease_ms,
            backs_off: flags.0,
            outside: flags.1,
            ramp_ms,
            count_cancelled_ms,
        },
    )
}

// ===== The run =====

struct Call {
    number: usize,
    /// The stay in which the call counts, or `None` if it does not count.
    stay: Option<usize>,
    began: u64,
    head_took: Option<u64>,
    doing: Doing,
}

enum Doing {
    Asking(task::Spawn<Oneshot<CircuitBreaker<Strict>, Request<()>>>),
    Streaming { _body: Box<Response<TrackedBody<ScriptBody>>> },
}

impl Goes {
    /// Checks that the call was admitted or rejected as the model allows, and returns the stay in which it counts.
    /// `shadowed` is the number of calls that would have been rejected by now.
    fn went(
        self,
        model: &mut Model,
        went: bool,
        shadowed: u64,
    ) -> Result<Option<usize>, TestCaseError> {
        let (goes, stay) = match self {
            Goes::In(stay) => (true, Some(stay)),
            Goes::Shadowed => (true, None),
            Goes::Refused => (false, None),
            Goes::Perhaps(stay) => {
                let luck = if model.shadow { shadowed == model.shadowed } else { went };
                model.shadowed = shadowed;
                model.refused += u64::from(!luck && !model.shadow);
                (luck || model.shadow, luck.then_some(stay))
            }
        };
        prop_assert_eq!((went, shadowed), (goes, model.shadowed));
        Ok(stay)
    }
}

async fn run(config: Config, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let layer: CircuitBreakerLayer = config.layer();
    let (inner, watch) = Strict::holding();
    let (handle, service) = (layer.handle(), layer.layer(inner));
    let mut model = Model::new(config.clone());
    let mut calls: Vec<Call> = Vec::new();
    let mut isolations: Vec<Isolation> = Vec::new();
    let mut taken = None;
    for step in steps {
        match step {
            Step::Call => {
                let number = watch.seen().calls;
                let mut call = task::spawn(service.clone().oneshot(request()));
                let went = call.poll().is_pending();
                prop_assert_eq!(went, watch.seen().calls > number);
                let shadowed = handle.snapshot().shadowed;
                let stay = model.call(number).went(&mut model, went, shadowed)?;
                if went {
                    let (began, doing) = (model.now, Doing::Asking(call));
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
                let shadowed = handle.snapshot().shadowed;
                let stay = model.call(number).went(&mut model, panicked, shadowed)?;
                if panicked {
                    model.end(number, stay, End::Error, 0);
                }
            }
            Step::End(n, end) if !calls.is_empty() => {
                let mut call = calls.remove(n % calls.len());
                let took = call.head_took.unwrap_or(model.now - call.began);
                let Doing::Asking(asking) = &mut call.doing else {
                    // A good response whose body is dropped before its end.
                    model.end(call.number, call.stay, End::Success, took);
                    continue;
                };
                model.end(call.number, call.stay, end, took);
                match end {
                    End::Cancel | End::NoResponse => {}
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
                    CircuitState::ForcedOpen => handle.force_open(),
                    CircuitState::ForcedClosed => handle.force_closed(),
                    CircuitState::HalfOpen => handle.half_open(),
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
            Step::Shadow(on) => {
                handle.set_shadow(on);
                model.shadow = on;
            }
            Step::Take => taken = Some((handle.snapshot(), model.take())),
            Step::Restore => {
                if let Some((real, paper)) = &taken {
                    handle.restore(real);
                    model.restore(paper);
                }
            }
            Step::Adjust(by) => {
                model.adjust(by);
                prop_assert!(handle.set_trip(&model.config.trip()).is_ok());
            }
            Step::Wait(ms) => {
                model.config.open_ms = ms;
                prop_assert!(handle.set_open_for(model.config.wait()).is_ok());
            }
        }
        let seen = handle.snapshot();
        prop_assert_eq!(seen.state, model.state());
        prop_assert_eq!(handle.state(), model.state());
        prop_assert_eq!(seen.probes, model.probes.len());
        prop_assert!(seen.probes <= usize::from(config.probes));
        if seen.isolations == 0 {
            let progress = seen.half_open.map(|progress| (progress.passed, progress.failed));
            let expected = (model.state() == CircuitState::HalfOpen).then_some(model.progress());
            prop_assert_eq!(progress, expected);
        }
        prop_assert_eq!((seen.opened, seen.isolations), (model.opened, model.isolations));
        prop_assert_eq!((seen.rejected, seen.shadowed), (model.refused, model.shadowed));
        if seen.state == CircuitState::Closed {
            prop_assert_eq!(seen.seen.consecutive_failures, model.run);
            let seen = [seen.seen.window_calls, seen.seen.window_failures, seen.seen.window_slow];
            prop_assert_eq!(seen, model.windows());
        }
    }

    // After any schedule: no slot is lost, and good probes close the circuit.
    calls.clear();
    isolations.clear();
    handle.set_shadow(false);
    prop_assert_eq!((handle.snapshot().probes, watch.seen().in_flight), (0, 0));
    if matches!(handle.state(), CircuitState::ForcedOpen | CircuitState::ForcedClosed) {
        handle.reset();
    }
    // Longer than the maximum open time and the maximum ramp.
    tokio::time::advance(Duration::from_millis(400)).await;
    for _ in 0..config.probes {
        let probes = handle.state() == CircuitState::HalfOpen;
        if config.outside {
            handle.record(Outcome::success());
        } else {
            watch.script([Then::Answer(empty())]);
            prop_assert!(service.clone().oneshot(request()).await.is_ok());
        }
        if probes && handle.state() == CircuitState::Closed {
            // The circuit has closed and begun a new ramp.
            break;
        }
    }
    prop_assert_eq!(handle.state(), CircuitState::Closed);
    prop_assert_eq!(watch.seen().without_ready, 0);
    Ok(())
}

fn paused(config: Config, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.unwrap().block_on(run(config, steps))
}

// 10,000 cases in total, divided into tests that run in parallel.
proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

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
    fn any_schedule_over_a_window_of_time(
        config in configs(within().prop_map(|rule| vec![rule])), steps in steps(),
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
        config in configs(prop::collection::vec(prop_oneof![consecutive(), failed(), slow(), within()], 2..5)),
        steps in steps(),
    ) {
        paused(config, steps)?;
    }
}
