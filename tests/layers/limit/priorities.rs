//! Exempt calls, partitions and priorities.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use buttress::{
    ConcurrencyLimitLayer, Deadline,
    limit::{
        CallPermit,
        adaptive::{Algorithm, LimitChange, Sample},
        partition::{
            CallClass, ClassifyCall, Partition, PartitionedLimit, PartitionedLimitHandle,
            PartitionedLimitLayer, Priority,
        },
    },
    outcome::RejectedKind,
};
use futures_util::FutureExt;
use http::Request;
use proptest::prelude::*;
use tokio::time::{advance, sleep};
use tokio_test::{assert_pending, assert_ready, assert_ready_ok, task};
use tower::{Layer, Service, ServiceExt, service_fn, util::Oneshot};

use crate::support::{
    Oops, Strict, Watch,
    contract::{Subject, contract_tests},
    empty, hello, read, refused_as, request,
};

type ByRequest = fn(&Request<()>) -> CallClass;
type Limit = PartitionedLimit<Strict, ByRequest>;
type Call = task::Spawn<Oneshot<Limit, Request<()>>>;

/// Returns the claim in the extensions of the request.
fn asked(request: &Request<()>) -> CallClass {
    request.extensions().get().copied().unwrap_or_default()
}

fn asking(claim: CallClass) -> Request<()> {
    let mut request = request();
    request.extensions_mut().insert(claim);
    request
}

/// A limit of one, with a partition that has all of it.
struct One {
    layer: PartitionedLimitLayer<ByRequest>,
    handle: PartitionedLimitHandle,
    occupant: Option<<Limit as Service<Request<()>>>::Future>,
}

impl Subject for One {
    type Layer = PartitionedLimitLayer<ByRequest>;
    type Service = Limit;

    async fn new() -> Self {
        let only: ByRequest = |_| CallClass::default().partition(0);
        let layer = ConcurrencyLimitLayer::new(1).classify_by(only).partitions(&[1.0]);
        Self { handle: layer.handle(), layer, occupant: None }
    }

    fn layer(&self) -> &Self::Layer {
        &self.layer
    }

    fn taken(&self) -> usize {
        assert_eq!(self.handle.limit().in_flight(), self.handle.partitions()[0].in_flight);
        self.handle.limit().in_flight() as usize - usize::from(self.occupant.is_some())
    }

    fn shut(&mut self) {
        let (inner, _) = Strict::holding();
        self.occupant = Some(self.layer.layer(inner).call(request()));
    }

    fn unshut(&mut self) {
        self.occupant = None;
    }
}

contract_tests!(One);

// ===== Faulty sorters =====

/// The classifier runs before the call acquires a permit, so its panic loses the request and nothing else.
#[tokio::test(start_paused = true)]
async fn a_classifier_that_panics_acquires_no_permit() {
    let sort: ByRequest = |request| match request.extensions().get() {
        Some(claim) => *claim,
        None => panic!("a request without a claim"),
    };
    let layer =
        ConcurrencyLimitLayer::new(1).classify_by(sort).partitions(&[1.0]).reject_by_priority();
    let (inner, watch) = Strict::new();
    let (mut service, handle) = (layer.layer(inner), layer.handle());
    service.ready().await.unwrap();
    let call = AssertUnwindSafe(|| drop(service.call(request())));
    assert!(catch_unwind(call).is_err());
    assert_eq!((handle.limit().in_flight(), handle.partitions()[0].in_flight), (0, 0));
    // The same instance serves the next call.
    let asked = asking(CallClass::default().partition(0));
    service.ready().await.unwrap().call(asked).await.unwrap();
    drop(service);
    let seen = watch.seen();
    assert_eq!((seen.calls, seen.reserved, seen.without_ready), (1, 0, 0));
}

/// The algorithm panics at a response head. The call succeeds, and releases its permit and the share of its partition.
#[tokio::test(start_paused = true)]
async fn algorithm_that_panics_fails_no_call_and_its_permit_is_released() {
    #[derive(Clone, Debug)]
    struct Touchy;
    impl Algorithm for Touchy {
        fn limit(&self) -> u32 {
            2
        }
        fn set_limit(&mut self, _: u32) {}
        fn on_sample(&mut self, _: &Sample) -> Option<LimitChange> {
            panic!("an algorithm")
        }
    }
    let sort: ByRequest = |_| CallClass::default().partition(0);
    let layer = ConcurrencyLimitLayer::adaptive(Touchy).classify_by(sort).partitions(&[0.5]);
    let handle = layer.handle();
    let call = tokio::spawn(layer.layer(Strict::new().0).oneshot(request()));
    drop(call.await.unwrap().unwrap());
    assert_eq!((handle.limit().in_flight(), handle.partitions()[0].in_flight), (0, 0));
    assert_eq!(handle.limit().snapshot().limit, 2);
}

/// Claims of partitions that do not exist and of priorities above the maximum, alone and combined.
#[tokio::test(start_paused = true)]
async fn unknown_partitions_and_priorities_are_bounded() {
    let (service, watch, handle) = sorted(4, 0, &[f64::MIN_POSITIVE, 1e-9, 0.5]);
    let shares: Vec<u32> = handle.partitions().iter().map(|each| each.share).collect();
    assert_eq!(shares, [0, 0, 2]);
    let mut calls = Vec::new();
    for number in [3, 63, 64, 255] {
        let claim = CallClass::from(Priority::new(255).with_key([0xff; 300])).partition(number);
        let mut call = task::spawn(service.clone().oneshot(asking(claim)));
        assert_pending!(call.poll());
        calls.push(call);
    }
    assert_eq!(
        (watch.seen().calls, handle.limit().in_flight(), inside(&handle)),
        (4, 4, vec![0, 0, 0])
    );
    // An exempt call is exempt, whatever its other claims.
    let claim = CallClass::exempt().partition(2).priority(Priority::SHEDDABLE);
    let mut exempt = task::spawn(service.clone().oneshot(asking(claim)));
    assert_pending!(exempt.poll());
    assert_eq!((handle.limit().in_flight(), handle.limit().snapshot().exempt_in_flight), (4, 1));
    drop((calls, exempt));
    assert_eq!((handle.limit().in_flight(), handle.limit().snapshot().exempt_in_flight), (0, 0));
}

// ===== Exempt =====

#[tokio::test(start_paused = true)]
async fn an_exempt_path_is_never_rejected_and_counted_separately() {
    let layer = ConcurrencyLimitLayer::new(1).exempt_paths(["/livez", "/debug/*"]);
    let (inner, watch) = Strict::holding();
    let (handle, service) = (layer.handle(), layer.layer(inner));
    let to = |path: &str| {
        let mut call = task::spawn(service.clone().oneshot(Request::get(path).body(()).unwrap()));
        let answer = call.poll();
        (call, answer.is_pending())
    };
    let (mut first, goes) = to("/");
    assert!(goes);
    assert!(!to("/livezz").1);
    let mut exempt: Vec<_> = ["/livez", "/debug/pprof"]
        .map(to)
        .into_iter()
        .chain((0..4).map(|_| to("/livez")))
        .collect();
    assert!(exempt.iter().all(|(_, goes)| *goes));
    let told = handle.limit().snapshot();
    assert_eq!(
        (told.in_flight, told.exempt_in_flight, told.exempt, told.rejected_full),
        (1, 6, 6, 1)
    );
    // An exempt call lasts to the end of the response body, like every call.
    assert!(watch.end(5, Ok(hello())));
    let response = assert_ready_ok!(exempt[4].0.poll());
    assert_eq!(handle.limit().snapshot().exempt_in_flight, 6);
    read(response.into_body()).await.unwrap();
    assert_eq!(handle.limit().snapshot().exempt_in_flight, 5);
    drop(exempt);
    let told = handle.limit().snapshot();
    assert_eq!((told.in_flight, told.exempt_in_flight, told.exempt), (1, 0, 6));
    assert!(watch.end(0, Ok(empty())));
    assert_ready_ok!(first.poll());
    assert_eq!(handle.limit().in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_exempt_call_neither_waits_nor_is_rejected_at_its_deadline() {
    let by: ByRequest = |_| CallClass::exempt();
    let layer = ConcurrencyLimitLayer::new(1).queue(9, Duration::from_secs(9)).classify_by(by);
    let (inner, watch) = Strict::holding();
    let service = layer.layer(inner);
    let _place = layer.handle().limit().try_acquire().unwrap();
    let mut late = request();
    late.extensions_mut().insert(Deadline::after(Duration::ZERO));
    assert_pending!(task::spawn(service.oneshot(late)).poll());
    assert_eq!((watch.seen().calls, layer.handle().limit().snapshot().waiting), (1, 0));
}

// ===== Partitions =====

fn sorted(limit: usize, queue: usize, shares: &[f64]) -> (Limit, Watch, PartitionedLimitHandle) {
    let layer = ConcurrencyLimitLayer::new(limit)
        .queue(queue, Duration::from_secs(5))
        .classify_by(asked as ByRequest)
        .partitions(shares);
    let (inner, watch) = Strict::holding();
    (layer.layer(inner), watch, layer.handle())
}

fn start(service: &Limit, partition: u8) -> (Call, bool) {
    let asks = CallClass::default().partition(partition);
    let mut call = task::spawn(service.clone().oneshot(asking(asks)));
    let goes = call.poll().is_pending();
    (call, goes)
}

fn inside(handle: &PartitionedLimitHandle) -> Vec<u32> {
    handle.partitions().iter().map(|partition| partition.in_flight).collect()
}

#[tokio::test(start_paused = true)]
async fn invalid_partitions_are_a_typed_error() {
    let one = || ConcurrencyLimitLayer::new(1).classify_by(asked as ByRequest);
    for (shares, remedy) in [
        (vec![0.0], "above 0"),
        (vec![1.1], "up to 1"),
        (vec![f64::NAN], "above 0"),
        (vec![0.6, 0.6], "with a sum"),
        (vec![0.01; 65], "at most 64"),
    ] {
        let fault = one().partitions(&shares).checked().unwrap_err();
        assert_eq!(fault.field, "partitions");
        assert!(fault.remedy.contains(remedy), "{fault}");
        assert_eq!(one().handle().set_partitions(&shares).unwrap_err(), fault);
    }
    assert!(one().partitions(&[0.1; 10]).checked().is_ok());
}

#[tokio::test(start_paused = true)]
async fn an_unused_share_is_borrowed_and_returned() {
    let (service, watch, handle) = sorted(10, 0, &[0.7, 0.3]);
    let mut batch: Vec<_> = (0..10).map(|_| start(&service, 1)).collect();
    assert!(batch.iter().all(|(_, goes)| *goes), "other calls may use an idle share");
    assert!(!start(&service, 1).1 && !start(&service, 9).1);
    // The owner of the share is owed two permits: it gets the next two that are released, whichever call asks first.
    assert!(!start(&service, 0).1 && !start(&service, 0).1);
    for (number, (call, _)) in batch.iter_mut().enumerate().take(2) {
        watch.end(number, Ok(empty()));
        assert_ready_ok!(call.poll());
    }
    assert!(!start(&service, 1).1 && !start(&service, 9).1);
    let live = [start(&service, 0), start(&service, 0)];
    assert!(live.iter().all(|(_, goes)| *goes));
    assert_eq!((inside(&handle), handle.limit().in_flight()), (vec![2, 8], 10));
    let told: Vec<Partition> = handle.partitions();
    assert_eq!((told[0].share, told[1].share), (7, 3));
    assert_eq!((told[0].rejected, told[1].rejected), (2, 2));
}

#[tokio::test(start_paused = true)]
async fn a_permit_is_reserved_for_a_second_after_a_rejection() {
    let (service, watch, handle) = sorted(2, 0, &[0.5]);
    let mut others = [start(&service, 9), start(&service, 9)];
    assert!(!start(&service, 0).1, "its share is in use by others");
    watch.end(0, Ok(empty()));
    assert_ready_ok!(others[0].0.poll());
    assert!(!start(&service, 9).1, "the permit is reserved for the partition");
    assert!(handle.limit().try_acquire().is_err(), "the permit is reserved for the partition");
    advance(Duration::from_secs(1)).await;
    assert!(handle.limit().try_acquire().is_ok());
    assert!(start(&service, 9).1);
    assert_eq!(inside(&handle), [0]);
}

/// A queued caller gets a reserved permit at the end of the reservation, although nothing else wakes it.
#[tokio::test(start_paused = true)]
async fn queued_caller_acquires_a_reserved_permit_after_the_reservation() {
    let (service, watch, handle) = sorted(2, 9, &[0.5]);
    let mut others = [start(&service, 9), start(&service, 9)];
    let (owner, _) = start(&service, 0);
    advance(Duration::from_millis(4900)).await;
    // The owner waits for another 100 ms and is then rejected, which reserves a permit for its partition for 1 s.
    let mut waiting = start(&service, 9).0;
    let mut owner = owner;
    advance(Duration::from_millis(100)).await;
    assert!(assert_ready!(owner.poll()).is_err());
    watch.end(0, Ok(empty()));
    assert_ready_ok!(others[0].0.poll());
    assert_eq!((handle.limit().in_flight(), handle.limit().snapshot().waiting), (1, 1));
    for _ in 0..5 {
        advance(Duration::from_millis(450)).await;
        let _ = waiting.is_woken().then(|| assert_pending!(waiting.poll()));
    }
    assert_eq!(
        (handle.limit().in_flight(), handle.limit().snapshot().waiting, watch.seen().calls),
        (2, 0, 3)
    );
}

#[tokio::test(start_paused = true)]
async fn the_partition_that_uses_the_smallest_part_of_its_share_is_admitted_first() {
    let (service, watch, handle) = sorted(4, 9, &[0.5, 0.5]);
    let mut held: Vec<_> = (0..4).map(|_| start(&service, 0).0).collect();
    let (mut more, first, second) =
        (start(&service, 0).0, start(&service, 1).0, start(&service, 1).0);
    for (number, expected) in
        [[false, true, false], [false, true, true], [true, true, true]].into_iter().enumerate()
    {
        watch.end(number, Ok(empty()));
        assert_ready_ok!(held[number].poll());
        assert_eq!([more.is_woken(), first.is_woken(), second.is_woken()], expected);
        assert_eq!(handle.limit().in_flight(), 4);
    }
    assert_eq!(inside(&handle), [2, 2]);
    assert_pending!(more.poll());
    drop((more, first, second, held));
    assert_eq!((inside(&handle), handle.limit().in_flight()), (vec![0, 0], 0));
}

#[tokio::test(start_paused = true)]
async fn shares_change_while_calls_are_in_flight() {
    let (service, _watch, handle) = sorted(10, 0, &[0.5, 0.5]);
    let calls: Vec<_> = (0..5).flat_map(|_| [start(&service, 0), start(&service, 1)]).collect();
    assert!(calls.iter().all(|(_, goes)| *goes));
    handle.set_partitions(&[0.2]).unwrap();
    assert_eq!(inside(&handle), [5, 5]);
    assert_eq!(handle.partitions().iter().map(|one| one.share).collect::<Vec<_>>(), [2, 0]);
    handle.limit().set_limit(20).unwrap();
    handle.set_partitions(&[0.3, 0.3, 0.4]).unwrap();
    assert_eq!(handle.partitions()[2].share, 8);
    assert!(start(&service, 2).1);
    drop(calls);
    assert_eq!((inside(&handle), handle.limit().in_flight()), (vec![0, 0, 0], 0));
}

/// A permit that a handler has taken for a socket counts in its partition until the socket is closed.
#[tokio::test(start_paused = true)]
async fn an_owned_permit_stays_in_its_partition() {
    let layer = ConcurrencyLimitLayer::new(4)
        .upgrades()
        .classify_by(asked as ByRequest)
        .partitions(&[0.5, 0.5]);
    let handle = layer.handle();
    let service = layer.layer(service_fn(|request: Request<()>| async move {
        let place = request.extensions().get::<CallPermit>().and_then(CallPermit::take);
        let mut answer = empty();
        answer.extensions_mut().insert(Arc::new(place));
        Ok::<_, Oops>(answer)
    }));
    let call = |asks: CallClass| service.clone().oneshot(asking(asks));
    let socket = call(CallClass::default().partition(1)).await.unwrap();
    let (head, body) = socket.into_parts();
    drop(body);
    assert_eq!((inside(&handle), handle.limit().in_flight()), (vec![0, 1], 1));
    let exempt = call(CallClass::exempt()).await.unwrap();
    assert_eq!((handle.limit().snapshot().exempt_in_flight, handle.limit().in_flight()), (1, 1));
    drop((head, exempt));
    assert_eq!((inside(&handle), handle.limit().in_flight()), (vec![0, 0], 0));
    assert_eq!(handle.limit().snapshot().exempt_in_flight, 0);
}

// ===== Partitions, any schedule =====

#[derive(Clone, Copy, Debug)]
enum Step {
    Arrive(u8),
    /// Drops the n-th of the calls, with a permit or queued.
    Leave(usize),
    Advance(u64),
    Resize(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (0..4_u8).prop_map(Step::Arrive),
        5 => (0..16usize).prop_map(Step::Leave),
        2 => (1..700u64).prop_map(Step::Advance),
        1 => (1..12usize).prop_map(Step::Resize),
    ];
    prop::collection::vec(step, 1..120)
}

const SHARES: [f64; 3] = [0.5, 0.3, 0.1];

/// A naive model of the documented behaviour.
#[derive(Default)]
struct Model {
    limit: u32,
    inside: [u32; 4],
    owed: [u32; 3],
    refused_at: [Option<u64>; 3],
    now: u64,
}

impl Model {
    fn own(&self, partition: usize) -> u32 {
        SHARES.get(partition).map_or(0, |share| (share * f64::from(self.limit) + 1e-6) as u32)
    }

    fn owed(&self, partition: usize) -> u32 {
        match self.refused_at[partition] {
            Some(at) if self.now - at < 1000 => {
                self.owed[partition].min(self.own(partition).saturating_sub(self.inside[partition]))
            }
            _ => 0,
        }
    }

    fn arrive(&mut self, partition: usize) -> bool {
        let all: u32 = self.inside.iter().sum();
        let within = self.inside[partition] < self.own(partition);
        let owed: u32 =
            (0..3).filter(|other| *other != partition).map(|other| self.owed(other)).sum();
        let goes = all < self.limit && (within || self.limit - all > owed);
        if goes {
            self.inside[partition] += 1;
        }
        if partition < 3 && goes {
            self.owed[partition] = self.owed[partition].saturating_sub(1);
        } else if partition < 3 && within {
            let live = self.refused_at[partition].is_some_and(|at| self.now - at < 1000);
            let before = if live { self.owed[partition] } else { 0 };
            self.owed[partition] = (before + 1).min(self.own(partition));
            self.refused_at[partition] = Some(self.now);
        }
        goes
    }
}

async fn without_a_queue(limit: usize, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let (service, _watch, handle) = sorted(limit, 0, &SHARES);
    let mut model = Model { limit: limit as u32, ..Model::default() };
    let mut calls: Vec<(Call, usize)> = Vec::new();
    for step in steps {
        match step {
            Step::Arrive(partition) => {
                let (call, goes) = start(&service, partition);
                let partition = usize::from(partition);
                prop_assert_eq!(goes, model.arrive(partition));
                if goes {
                    calls.push((call, partition));
                }
            }
            Step::Leave(number) if number < calls.len() => {
                model.inside[calls.swap_remove(number).1] -= 1;
            }
            Step::Leave(_) => {}
            Step::Advance(ms) => {
                advance(Duration::from_millis(ms)).await;
                model.now += ms;
            }
            Step::Resize(limit) => {
                handle.limit().set_limit(limit).unwrap();
                model.limit = limit as u32;
            }
        }
        prop_assert_eq!(inside(&handle), &model.inside[..3]);
        prop_assert_eq!(handle.limit().in_flight(), model.inside.iter().sum::<u32>());
    }
    Ok(())
}

/// With a queue: the limit is never exceeded, and no call waits beside a free permit within the share of its partition.
async fn with_a_queue(limit: usize, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let (service, watch, handle) = sorted(limit, 6, &SHARES);
    let mut calls: Vec<(Call, u8)> = Vec::new();
    let mut limit = limit as u32;
    for step in steps {
        match step {
            Step::Arrive(partition) => {
                let (call, goes) = start(&service, partition);
                calls.extend(goes.then_some((call, partition)));
            }
            Step::Leave(number) if number < calls.len() => drop(calls.swap_remove(number)),
            Step::Leave(_) => {}
            Step::Advance(ms) => advance(Duration::from_millis(ms)).await,
            Step::Resize(to) => {
                handle.limit().set_limit(to).unwrap();
                limit = to as u32;
            }
        }
        // A caller that ends may admit another one.
        while calls.iter().any(|(call, _)| call.is_woken()) {
            calls.retain_mut(|(call, _)| !call.is_woken() || call.poll().is_pending());
        }
        let (told, each) = (handle.limit().snapshot(), handle.partitions());
        prop_assert!(told.waiting <= 6);
        prop_assert_eq!(watch.seen().in_flight, told.in_flight as usize);
        let shared: u32 = each.iter().map(|one| one.in_flight).sum();
        prop_assert!(shared <= told.in_flight);
        if told.in_flight < limit {
            // A call without a permit waits. Within the share of its partition it must not wait.
            for (partition, one) in each.iter().enumerate() {
                let present =
                    calls.iter().filter(|(_, of)| usize::from(*of) == partition).count() as u32;
                let waits = present > one.in_flight;
                prop_assert!(!waits || one.in_flight >= one.share);
            }
        }
    }
    drop(calls);
    prop_assert_eq!((handle.limit().in_flight(), handle.limit().snapshot().waiting), (0, 0));
    prop_assert_eq!(inside(&handle), [0, 0, 0]);
    Ok(())
}

fn in_virtual_time<F: Future<Output = Result<(), TestCaseError>>>(
    run: F,
) -> Result<(), TestCaseError> {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_time().start_paused(true).build().unwrap().block_on(run)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn shares_apply_as_documented(limit in 1..12usize, steps in steps()) {
        in_virtual_time(without_a_queue(limit, steps))?;
    }

    #[test]
    fn the_queue_contains_the_calls_of_the_highest_priority(limit in 1..6usize, steps in steps()) {
        in_virtual_time(by_worth(limit, steps))?;
    }

    #[test]
    fn shares_apply_to_queued_callers(limit in 1..12usize, steps in steps()) {
        in_virtual_time(with_a_queue(limit, steps))?;
    }
}

// ===== Priorities =====

/// A classifier of requests that carry their own class.
#[derive(Clone)]
struct Itself;

impl ClassifyCall<Priority> for Itself {
    fn classify(&self, request: &Priority) -> CallClass {
        CallClass::from(*request)
    }
}

/// Offers 4000 calls per second to a server that serves 2000: 20 permits and 10 ms per call. Each request makes `calls`
/// calls one after the other, each with the priority that `draw` returns. Returns the shares of the requests that
/// succeeded: those of users with high lots, and those of users with low ones.
async fn served(calls: usize, draw: fn(u64, usize) -> Priority) -> [f64; 2] {
    let layer = ConcurrencyLimitLayer::new(20).queue(20, Duration::from_millis(50)).per_response();
    let layer = layer.classify_by(Itself).reject_by_priority();
    let service = layer.layer(service_fn(|_: Priority| async {
        sleep(Duration::from_millis(10)).await;
        Ok::<_, Oops>(())
    }));
    let done: Arc<[[AtomicU32; 2]; 2]> = Arc::default();
    let mut dice = fastrand::Rng::with_seed(7);
    for ms in 0..20_000 {
        sleep(Duration::from_millis(1)).await;
        for _ in 0..4 / calls {
            let (user, warm) = (dice.u64(..), ms > 10_000);
            let (service, done) = (service.clone(), done.clone());
            tokio::spawn(async move {
                for call in 0..calls {
                    let answer = service.clone().oneshot(draw(user, call)).await;
                    let last = call + 1 == calls;
                    if warm && (last || answer.is_err()) {
                        let half = &done[usize::from(is_low(user))];
                        half[0].fetch_add(1, Ordering::Relaxed);
                        half[1].fetch_add(u32::from(answer.is_ok()), Ordering::Relaxed);
                    }
                    if answer.is_err() {
                        return;
                    }
                }
            });
        }
    }
    sleep(Duration::from_secs(1)).await;
    let count = |half: usize, what: usize| f64::from(done[half][what].load(Ordering::Relaxed));
    [0, 1].map(|half| count(half, 1) / count(half, 0))
}

fn by_user(user: u64, _: usize) -> Priority {
    Priority::NORMAL.with_key(user.to_le_bytes())
}

fn by_call(user: u64, call: usize) -> Priority {
    Priority::NORMAL.with_key([user.to_le_bytes(), call.to_le_bytes()].concat())
}

/// Whether the lot of the user is in the lower half.
fn is_low(user: u64) -> bool {
    let lot = format!("{:?}", by_user(user, 0));
    lot.trim_end_matches(" }").rsplit(' ').next().unwrap().parse::<u32>().unwrap() < 64
}

#[tokio::test(start_paused = true)]
async fn at_twice_the_capacity_the_limit_rejects_the_same_half() {
    let [high, low] = served(1, by_user).await;
    assert!(high > 0.9 && low < 0.1, "{high:.2} {low:.2}");
}

/// Four calls per request, at twice the load that the limit can serve.
#[tokio::test(start_paused = true)]
async fn a_priority_that_stays_the_same_serves_whole_requests() {
    let consistent = served(4, by_user).await;
    let drawn_anew = served(4, by_call).await;
    let whole = |[high, low]: [f64; 2]| f64::midpoint(high, low);
    assert!(whole(consistent) > 0.45, "of a maximum of 0.5: {consistent:?}");
    assert!(whole(drawn_anew) < 0.35, "{drawn_anew:?}");
    assert!(consistent[0] > 4.0 * consistent[1], "{consistent:?}");
}

#[tokio::test(start_paused = true)]
async fn no_call_is_rejected_by_priority_while_permits_are_free() {
    let layer =
        ConcurrencyLimitLayer::new(20).per_response().classify_by(Itself).reject_by_priority();
    let service = layer.layer(service_fn(|_: Priority| std::future::ready(Ok::<_, Oops>(()))));
    for user in 0..10_000_u64 {
        advance(Duration::from_millis(1)).await;
        service.clone().oneshot(by_user(user, 0)).await.unwrap();
    }
    assert_eq!(
        (layer.handle().limit().snapshot().rejected_outranked, layer.handle().reject_below()),
        (0, None)
    );
}

fn worth(service: &Limit, priority: Priority) -> Call {
    let mut call = task::spawn(service.clone().oneshot(asking(priority.into())));
    let _ = call.poll();
    call
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_displaces_the_caller_of_the_lowest_priority() {
    let layer = ConcurrencyLimitLayer::new(1).queue(2, Duration::from_secs(5));
    let layer = layer.classify_by(asked as ByRequest).reject_by_priority();
    let (inner, watch) = Strict::holding();
    let (service, handle) = (layer.layer(inner), layer.handle());
    let mut first = worth(&service, Priority::SHEDDABLE);
    let (low, mut later) =
        (worth(&service, Priority::SHEDDABLE), worth(&service, Priority::SHEDDABLE));
    // A call of an equal priority is rejected, and `try_acquire` displaces no call.
    let sheddable = service.clone().oneshot(asking(Priority::SHEDDABLE.into()));
    assert_eq!(refused_as(sheddable.await), RejectedKind::Full);
    assert!(handle.limit().try_acquire().is_err());
    assert_eq!((handle.limit().snapshot().waiting, later.is_woken()), (2, false));

    // Of two calls of the same priority, the later one is displaced first.
    let mut normal = worth(&service, Priority::NORMAL);
    assert!(later.is_woken() && !low.is_woken());
    assert_eq!(refused_as(assert_ready!(later.poll())), RejectedKind::Outranked);
    let critical = worth(&service, Priority::CRITICAL);
    assert!(low.is_woken() && !normal.is_woken());
    // The displaced call is dropped before it has observed its rejection: nothing is lost.
    drop(low);
    let no_more = service.clone().oneshot(asking(Priority::NORMAL.into()));
    assert_eq!(refused_as(no_more.await), RejectedKind::Full);
    let told = handle.limit().snapshot();
    assert_eq!((told.waiting, told.in_flight, told.rejected_outranked), (2, 1, 1));

    // Priorities do not change the order of the queue: the oldest caller is first.
    watch.end(0, Ok(empty()));
    assert_ready_ok!(first.poll());
    assert!(normal.is_woken() && !critical.is_woken());
    assert_pending!(normal.poll());
    drop((normal, critical));
    assert_eq!((handle.limit().in_flight(), handle.limit().snapshot().waiting), (0, 0));
}

/// Any queued call has at least the priority of a call that is rejected because the queue is full.
async fn by_worth(limit: usize, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let layer = ConcurrencyLimitLayer::new(limit).queue(4, Duration::from_secs(5));
    let layer = layer.classify_by(asked as ByRequest).reject_by_priority();
    let (inner, watch) = Strict::holding();
    let (service, handle) = (layer.layer(inner), layer.handle());
    // Each call with its priority, and whether it has a permit.
    let mut calls: Vec<(Call, Priority, bool)> = Vec::new();
    for step in steps {
        let before = watch.seen().calls;
        match step {
            Step::Arrive(level) => {
                let priority = Priority::new(level);
                let asks = asking(priority.into());
                let mut call = task::spawn(service.clone().oneshot(asks));
                match call.poll() {
                    std::task::Poll::Pending => {
                        calls.push((call, priority, watch.seen().calls > before));
                    }
                    std::task::Poll::Ready(answer) => {
                        if refused_as(answer) == RejectedKind::Full {
                            let waits = calls.iter().filter(|(_, _, inside)| !inside);
                            let least = waits.map(|(_, worth, _)| *worth).min();
                            prop_assert!(least.is_some_and(|least| least >= priority));
                        }
                    }
                }
            }
            Step::Leave(number) if number < calls.len() => drop(calls.swap_remove(number)),
            Step::Leave(_) => {}
            Step::Advance(ms) => advance(Duration::from_millis(ms)).await,
            Step::Resize(to) => handle.limit().set_limit(to).unwrap(),
        }
        while calls.iter().any(|(call, ..)| call.is_woken()) {
            calls.retain_mut(|(call, _, inside)| {
                let before = watch.seen().calls;
                let stays = !call.is_woken() || call.poll().is_pending();
                *inside |= watch.seen().calls > before;
                stays
            });
        }
        let (told, inside) =
            (handle.limit().snapshot(), calls.iter().filter(|(_, _, inside)| *inside));
        prop_assert_eq!(inside.count(), told.in_flight as usize);
        prop_assert_eq!(calls.len(), (told.in_flight + told.waiting) as usize);
        prop_assert!(told.waiting <= 4);
    }
    drop(calls);
    prop_assert_eq!((handle.limit().in_flight(), handle.limit().snapshot().waiting), (0, 0));
    Ok(())
}

/// After the load has fallen, the threshold of the priorities falls as well.
#[tokio::test(start_paused = true)]
async fn the_priority_threshold_falls_when_the_load_falls() {
    let (service, watch, handle) = {
        let layer =
            ConcurrencyLimitLayer::new(2).classify_by(asked as ByRequest).reject_by_priority();
        let (inner, watch) = Strict::holding();
        (layer.layer(inner), watch, layer.handle())
    };
    let mut held = VecDeque::new();
    let mut outranked = 0;
    for user in 0..4000_u64 {
        advance(Duration::from_millis(1)).await;
        let mut call = task::spawn(service.clone().oneshot(asking(by_user(user, 0).into())));
        if call.poll().is_pending() {
            held.push_back(call);
        }
        if user % 50 == 49 {
            held.pop_front();
        }
        outranked = handle.limit().snapshot().rejected_outranked;
    }
    assert!(outranked > 1000 && handle.reject_below().is_some());
    held.clear();
    assert_eq!((watch.seen().in_flight, handle.limit().in_flight()), (0, 0));
    let mut refused_late = 0;
    for user in 0..20_000_u64 {
        advance(Duration::from_millis(1)).await;
        let mut call = task::spawn(service.clone().oneshot(asking(by_user(user, 0).into())));
        match call.poll() {
            std::task::Poll::Pending => {}
            std::task::Poll::Ready(answer) => {
                assert_eq!(refused_as(answer), RejectedKind::Outranked);
                refused_late = user;
            }
        }
    }
    assert_eq!(handle.reject_below(), None);
    assert!(refused_late < 15_000, "{refused_late}");
}

// ===== Under real threads =====

/// Counts the calls in the service, now and at the maximum.
struct Inside(Arc<(AtomicU32, AtomicU32)>);

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Some calls are displaced, some are dropped while they wait or run, shares and limit change: no call hangs, and no
/// permit is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 8)]
async fn many_threads_of_all_partitions_lose_no_permit() {
    let layer = ConcurrencyLimitLayer::new(4).queue(16, Duration::from_secs(60)).per_response();
    let sort: fn(&CallClass) -> CallClass = |claim| *claim;
    let layer = layer.classify_by(sort).partitions(&[0.5, 0.25]).reject_by_priority();
    let handle = layer.handle();
    let busy = Arc::new((AtomicU32::new(0), AtomicU32::new(0)));
    let seen = busy.clone();
    let service = layer.layer(service_fn(move |_: CallClass| {
        let busy = busy.clone();
        async move {
            let now = busy.0.fetch_add(1, Ordering::SeqCst) + 1;
            busy.1.fetch_max(now, Ordering::SeqCst);
            let _inside = Inside(busy);
            tokio::task::yield_now().await;
            Ok::<_, Oops>(())
        }
    }));
    let mut callers = tokio::task::JoinSet::new();
    for n in 0..64_u8 {
        let (service, handle) = (service.clone(), handle.clone());
        callers.spawn(async move {
            for round in 0..100_u8 {
                let claim = CallClass::from(Priority::new(round % 8)).partition(n % 3);
                if (n + round) % 3 == 0 {
                    // Dropped after one poll, with or without a permit.
                    let _ = service.clone().oneshot(claim).now_or_never();
                } else if let Err(refused) = service.clone().oneshot(claim).await {
                    let refused = buttress::Rejected::find(&*refused)
                        .expect("a rejection, because the service does not fail");
                    let kinds = [RejectedKind::Full, RejectedKind::Outranked];
                    assert!(kinds.contains(&refused.kind()), "{refused}");
                }
                match n {
                    0 => handle.limit().set_limit(1 + usize::from(round % 4)).unwrap(),
                    1 => handle.set_partitions(&[0.1 * f64::from(1 + round % 9)]).unwrap(),
                    _ => {}
                }
            }
        });
    }
    let all = tokio::time::timeout(Duration::from_secs(60), callers.join_all());
    all.await.expect("a caller hangs");
    assert!(seen.1.load(Ordering::SeqCst) <= 4);
    assert_eq!((handle.limit().in_flight(), handle.limit().snapshot().waiting), (0, 0));
    assert!(handle.partitions().iter().all(|partition| partition.in_flight == 0));
}
