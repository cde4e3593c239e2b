//! The concurrency limit against a naive model: any schedule of arrivals, ends, hang-ups, pauses and changes of the
//! limit, in each order of the queue.

use std::{collections::VecDeque, time::Duration};

use buttress::{ConcurrencyLimit, ConcurrencyLimitLayer, limit::QueueOrder, outcome::RejectedKind};
use http::Request;
use proptest::prelude::*;
use tokio_test::{assert_ready_ok, task};
use tower::{Layer, ServiceExt, util::Oneshot};

use crate::support::{Strict, empty, refused_as, request};

#[derive(Clone, Copy, Debug)]
enum Step {
    Arrive,
    /// Ends the n-th of the calls with a permit.
    End(usize),
    /// The same, and the next queued caller is dropped before it has observed its permit.
    EndAndNextLeaves(usize),
    /// Drops the n-th of all callers, with a permit or queued.
    Leave(usize),
    Advance(u64),
    Resize(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        10 => Just(Step::Arrive),
        5 => (0..8usize).prop_map(Step::End),
        1 => (0..8usize).prop_map(Step::EndAndNextLeaves),
        3 => (0..12usize).prop_map(Step::Leave),
        2 => (1..60u64).prop_map(Step::Advance),
        2 => (1..6usize).prop_map(Step::Resize),
    ];
    prop::collection::vec(step, 1..80)
}

fn orders() -> impl Strategy<Value = QueueOrder> {
    prop_oneof![
        Just(QueueOrder::Fifo),
        Just(QueueOrder::Lifo),
        (1..PATIENCE).prop_map(|ms| QueueOrder::Adaptive(Duration::from_millis(ms))),
    ]
}

#[derive(Debug, Default)]
struct Model {
    limit: usize,
    inside: Vec<usize>,
    /// The queued callers, each with the end of its maximum wait.
    waiting: VecDeque<(usize, u64)>,
    full: u64,
    waited: u64,
    order: QueueOrder,
    now: u64,
}

impl Model {
    /// The caller that would get the next permit.
    fn next(&self) -> Option<usize> {
        let newest_first = match self.order {
            QueueOrder::Lifo => true,
            QueueOrder::Adaptive(longest) => self.waiting.front().is_some_and(|(_, until)| {
                u128::from(self.now + PATIENCE - until) >= longest.as_millis()
            }),
            _ => false,
        };
        let next = if newest_first { self.waiting.back() } else { self.waiting.front() };
        next.map(|(who, _)| *who)
    }

    fn let_in(&mut self) {
        while self.inside.len() < self.limit {
            let Some(next) = self.next() else { break };
            self.waiting.retain(|(who, _)| *who != next);
            self.inside.push(next);
        }
    }

    fn leave(&mut self, who: usize) {
        self.inside.retain(|one| *one != who);
        self.waiting.retain(|(one, _)| *one != who);
        self.let_in();
    }
}

struct Caller {
    who: usize,
    /// The number of the call at the inner service.
    number: Option<usize>,
    call: task::Spawn<Oneshot<ConcurrencyLimit<Strict>, Request<()>>>,
}

const PATIENCE: u64 = 50;

async fn run(
    limit: usize,
    queue: usize,
    order: QueueOrder,
    steps: Vec<Step>,
) -> Result<(), TestCaseError> {
    let layer = ConcurrencyLimitLayer::new(limit)
        .queue(queue, Duration::from_millis(PATIENCE))
        .queue_order(order);
    let (inner, watch) = Strict::holding();
    let (handle, service) = (layer.handle(), layer.layer(inner));
    let mut model = Model { limit, order, ..Model::default() };
    let mut callers: Vec<Caller> = Vec::new();
    let mut next = 0;
    for step in steps {
        match step {
            Step::Arrive => {
                let mut call = task::spawn(service.clone().oneshot(request()));
                let before = watch.seen().calls;
                let answer = call.poll();
                let went = watch.seen().calls > before;
                let may = model.waiting.is_empty() && model.inside.len() < model.limit;
                prop_assert_eq!(went, may);
                if went {
                    model.inside.push(next);
                } else if model.waiting.len() < queue {
                    model.waiting.push_back((next, model.now + PATIENCE));
                } else {
                    model.full += 1;
                    let std::task::Poll::Ready(answer) = answer else {
                        return Err(TestCaseError::fail("waits although the queue is full"));
                    };
                    prop_assert_eq!(refused_as(answer), RejectedKind::Full);
                    continue;
                }
                prop_assert!(answer.is_pending());
                callers.push(Caller { who: next, number: went.then_some(before), call });
                next += 1;
            }
            Step::End(n) | Step::EndAndNextLeaves(n) if !model.inside.is_empty() => {
                let who = model.inside[n % model.inside.len()];
                let at = callers.iter().position(|caller| caller.who == who).unwrap();
                let mut caller = callers.remove(at);
                prop_assert!(watch.end(caller.number.expect("in flight"), Ok(empty())));
                assert_ready_ok!(caller.call.poll());
                let second = model.next();
                model.leave(who);
                if let (Step::EndAndNextLeaves(_), Some(second)) = (step, second) {
                    callers.retain(|caller| caller.who != second);
                    model.leave(second);
                }
            }
            Step::Leave(n) if !callers.is_empty() => {
                let gone = callers.remove(n % callers.len());
                model.leave(gone.who);
            }
            Step::End(_) | Step::EndAndNextLeaves(_) | Step::Leave(_) => {}
            Step::Advance(ms) => {
                tokio::time::advance(Duration::from_millis(ms)).await;
                model.now += ms;
            }
            Step::Resize(limit) => {
                handle.set_limit(limit).unwrap();
                model.limit = limit;
                model.let_in();
            }
        }

        // Polls all callers in the order of their arrival. Each caller whose state has changed was woken.
        let mut stay = Vec::new();
        for mut caller in callers.drain(..) {
            let woken = caller.call.is_woken();
            let before = watch.seen().calls;
            let answer = caller.call.poll();
            if watch.seen().calls > before {
                prop_assert!(woken, "got a permit without a wake-up");
                prop_assert!(model.inside.contains(&caller.who), "got a permit out of order");
                caller.number = Some(before);
            }
            if let std::task::Poll::Ready(answer) = answer {
                prop_assert!(woken, "its maximum wait passed without a wake-up");
                prop_assert_eq!(refused_as(answer), RejectedKind::WaitedTooLong);
                let at = model.waiting.iter().position(|(who, _)| *who == caller.who);
                let (_, until) = model.waiting.remove(at.expect("waits")).unwrap();
                prop_assert!(until <= model.now);
                model.waited += 1;
                continue;
            }
            prop_assert_eq!(caller.number.is_some(), model.inside.contains(&caller.who));
            stay.push(caller);
        }
        callers = stay;
        prop_assert!(
            model.waiting.iter().all(|(_, until)| *until > model.now),
            "waits longer than the maximum"
        );

        let seen = handle.snapshot();
        prop_assert_eq!(seen.in_flight as usize, model.inside.len());
        prop_assert_eq!(watch.seen().in_flight, model.inside.len());
        prop_assert_eq!(seen.waiting as usize, model.waiting.len());
        prop_assert_eq!((seen.rejected_full, seen.rejected_waited), (model.full, model.waited));
    }
    drop(callers);
    let seen = handle.snapshot();
    prop_assert_eq!((seen.in_flight, seen.waiting, watch.seen().in_flight), (0, 0, 0));
    prop_assert_eq!((watch.seen().reserved, watch.seen().without_ready), (0, 0));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) })]

    #[test]
    fn any_schedule_does_what_the_model_does(
        limit in 1..5usize,
        queue in 0..6usize,
        order in orders(),
        steps in steps(),
    ) {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        runtime.unwrap().block_on(run(limit, queue, order, steps))?;
    }
}
