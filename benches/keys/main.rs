//! The slowest calls on a known key, while other keys are added: our keyed breaker beside other maps, in one run.
//!
//! ```sh
//! cargo bench -p buttress-benches --bench keys               # 1,000,000 keys: five minutes and 2 GiB
//! cargo bench -p buttress-benches --bench keys -- --quick    # 100,000 keys
//! ```
//!
//! Two phases. *Growth*: one thread adds keys as fast as it can, from none to the maximum. *Steady*: it adds 1,000 keys
//! a second to a map that is full, so that each addition evicts a key. In both, a second thread calls known keys and
//! measures each call alone. A peer is a map with a circuit breaker per key, and a queue of the keys for the eviction
//! in the order of insertion, whatever the state of the circuit. `nothing` is the same loop without a map.
//!
//! A call during which the machine preempts the thread is not a measurement of the map. `max running` is the slowest
//! call except those of 100 µs and more during which (or shortly before which) the thread was preempted. A wait for a
//! lock is not a preemption, even if the holder of the lock was preempted.

use std::{
    collections::{BTreeMap, HashMap, VecDeque, hash_map::RandomState},
    convert::Infallible,
    future::{Future, Ready, ready},
    hint::black_box,
    ops::Range,
    pin::pin,
    process::Command,
    sync::{
        Arc, Barrier, Mutex, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker},
    thread,
    time::{Duration, Instant},
};

use buttress::{
    CircuitBreaker, CircuitBreakerLayer,
    breaker::{KeyedCircuitBreaker, KeyedCircuitBreakerHandle},
    classify::PerResponse,
};
use tower::{Layer, Service};

const NEW_KEYS_PER_SECOND: u32 = 1000;
/// The number of rounds in which each map is measured. The figures are of the round with the least interference by the
/// machine.
const ROUNDS: usize = 3;
/// A call that takes this many nanoseconds may have been preempted.
const SLOW: u64 = 100_000;
const PHASES: [&str; 2] = ["growth", "steady"];
/// The number of keys that are called. They fit in the cache of the processor, so that the calls measure the locks.
const KNOWN: u64 = 64;

const NAMES: [&str; 5] = ["nothing", "buttress", "RwLock<HashMap>", "dashmap", "papaya"];

fn main() {
    let args: Vec<_> = std::env::args().skip(1).collect();
    let quick = args.iter().any(|arg| arg == "--quick");
    let (max, seconds) = if quick { (100_000, 2) } else { (1_000_000, 8) };
    if let Some(one) = args.iter().position(|arg| arg == "--one") {
        return measure_one(args.get(one + 1).map_or("", String::as_str), max, seconds);
    }
    println!(
        "{max} keys, {NEW_KEYS_PER_SECOND} new keys a second, nanoseconds per call on a known key"
    );
    println!(
        "{:16} {:8} {:>10} {:>8} {:>8} {:>10} {:>12} {:>10}",
        "", "phase", "calls", "p50", "p99.9", "p99.99", "max running", "max"
    );
    let mut best: BTreeMap<(&str, String), Figures> = BTreeMap::new();
    for _ in 0..ROUNDS {
        for name in NAMES {
            for (phase, now) in measure_apart(name, quick) {
                let best = best.entry((name, phase)).or_insert(now);
                *best = Figures { p999: best.p999.min(now.p999), max: best.max.min(now.max) };
            }
        }
    }
    for phase in PHASES {
        let of = |name| best.get(&(name, phase.to_owned())).copied().unwrap_or_default();
        let ours = of("buttress");
        for (peer, figure) in
            [("RwLock<HashMap>", "rwlock_hashmap"), ("dashmap", "dashmap"), ("papaya", "papaya")]
        {
            let ratio = ours.p999 as f64 / of(peer).p999.max(1) as f64;
            println!("figure keys/{phase}/p999_vs_{figure} {ratio:.2} ratio");
            println!("figure keys/{phase}/{figure}_max_running {} ns", of(peer).max);
        }
        println!("figure keys/{phase}/max_running {} ns", ours.max);
        println!("figure keys/{phase}/machine_max_running {} ns", of("nothing").max);
    }
}

/// Measures a map in a process of its own, because the heap that another map has left behind makes calls slower.
fn measure_apart(name: &str, quick: bool) -> Vec<(String, Figures)> {
    let mut child = Command::new(std::env::current_exe().expect("the path of this bench"));
    let output = child.args(["--one", name]).args(quick.then_some("--quick")).output();
    let output = String::from_utf8(output.expect("the bench runs").stdout).expect("UTF-8");
    print!("{output}");
    let row = |line: &str| {
        let fields: Vec<_> = line.get(name.len()..)?.split_whitespace().collect();
        let number = |nth: usize| fields.get(nth)?.parse().ok();
        Some((fields.first()?.to_string(), Figures { p999: number(3)?, max: number(5)? }))
    };
    output.lines().filter_map(row).collect()
}

fn measure_one(name: &str, max: u64, seconds: u64) {
    match name {
        "nothing" => measure(name, &Arc::new(Nothing), max, seconds),
        "buttress" => measure(name, &Arc::new(Ours::new(max)), max, seconds),
        "RwLock<HashMap>" => measure(name, &Arc::new(Locked::new(max)), max, seconds),
        "dashmap" => measure(name, &Arc::new(Dash::new(max)), max, seconds),
        "papaya" => measure(name, &Arc::new(Papaya::new(max)), max, seconds),
        _ => eprintln!("no map is called {name}"),
    }
}

fn first_known(max: u64) -> u64 {
    max / 2
}

// ===== Measurement =====

trait Map: Send + Sync + 'static {
    /// Calls a key, which is added if it is new.
    type Call: FnMut(u64) + Send + 'static;
    fn call(self: &Arc<Self>) -> Self::Call;
}

#[derive(Clone, Copy, Default)]
struct Figures {
    p999: u64,
    max: u64,
}

fn measure<M: Map>(name: &str, map: &Arc<M>, max: u64, seconds: u64) {
    let (start, done) = (Arc::new(Barrier::new(2)), Arc::new(AtomicBool::new(false)));
    let mut add = map.call();
    let first_known = first_known(max);
    let adds = {
        let (start, done) = (start.clone(), done.clone());
        thread::spawn(move || {
            pin_to(0);
            (0..KNOWN).for_each(|known| add(first_known + known));
            start.wait();
            (0..max).for_each(&mut add);
            done.store(true, Ordering::Release);
            start.wait();
            let began = Instant::now();
            for nth in 0..NEW_KEYS_PER_SECOND * seconds as u32 {
                let due = Duration::from_secs(1) / NEW_KEYS_PER_SECOND * nth;
                thread::sleep(due.saturating_sub(began.elapsed()));
                add(max + u64::from(nth));
            }
            done.store(true, Ordering::Release);
        })
    };
    let mut call = map.call();
    pin_to(1);
    for phase in PHASES {
        start.wait();
        let mut times = Vec::with_capacity(1 << 24);
        let (mut random, mut max, mut max_running) = (1_u64, 0, 0);
        loop {
            let switches = preemptions();
            for _ in 0..4096 {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let key = first_known + (random >> 33) % KNOWN;
                let began = Instant::now();
                call(key);
                let took = began.elapsed().as_nanos() as u64;
                if times.len() < times.capacity() {
                    times.push(took);
                }
                max = max.max(took);
                if took > max_running && (took < SLOW || preemptions() == switches) {
                    max_running = took;
                }
            }
            if done.swap(false, Ordering::Acquire) {
                break;
            }
        }
        print_row(name, phase, times, [max_running, max]);
    }
    adds.join().expect("no panic");
}

fn print_row(name: &str, phase: &str, mut times: Vec<u64>, [max_running, max]: [u64; 2]) {
    times.sort_unstable();
    let at = |share: f64| times[((times.len() as f64 * share) as usize).min(times.len() - 1)];
    println!(
        "{name:16} {phase:8} {:>10} {:>8} {:>8} {:>10} {max_running:>12} {max:>10}",
        times.len(),
        at(0.5),
        at(0.999),
        at(0.9999),
    );
}

/// Returns the number of preemptions of this thread. A wait for a lock is not counted.
fn preemptions() -> u64 {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let count = status.lines().find_map(|line| line.strip_prefix("nonvoluntary_ctxt_switches:"));
    count.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
}

fn pin_to(nth: usize) {
    if let Some(core) = core_affinity::get_core_ids().and_then(|cores| cores.get(nth).copied()) {
        core_affinity::set_for_current(core);
    }
}

// ===== Ours =====

#[derive(Clone)]
struct Bare;

impl Service<u64> for Bare {
    type Response = u64;
    type Error = Infallible;
    type Future = Ready<Result<u64, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, key: u64) -> Self::Future {
        ready(Ok(key))
    }
}

type Select = fn(&u64) -> u64;

struct Ours {
    service: KeyedCircuitBreaker<Bare, Select, u64, PerResponse>,
    _handle: KeyedCircuitBreakerHandle<u64>,
}

impl Ours {
    fn new(max: u64) -> Self {
        let layer = CircuitBreakerLayer::http().keyed((|key| *key) as Select);
        let layer = layer.max_keys(max as usize).per_response();
        Self { service: layer.layer(Bare), _handle: layer.handle() }
    }
}

impl Map for Ours {
    type Call = Box<dyn FnMut(u64) + Send>;

    fn call(self: &Arc<Self>) -> Self::Call {
        let mut service = self.service.clone();
        Box::new(move |key| call(&mut service, key))
    }
}

// ===== Peers =====

struct Nothing;

impl Map for Nothing {
    type Call = fn(u64);

    fn call(self: &Arc<Self>) -> Self::Call {
        |key| {
            black_box(key);
        }
    }
}

/// The circuit breaker of a key, for a peer.
type Circuit = CircuitBreaker<Bare, PerResponse>;

fn new_circuit() -> Circuit {
    CircuitBreakerLayer::http().per_response().layer(Bare)
}

fn call(service: &mut impl Service<u64>, key: u64) {
    let mut cx = Context::from_waker(Waker::noop());
    assert!(service.poll_ready(&mut cx).is_ready());
    assert!(pin!(service.call(key)).poll(&mut cx).is_ready());
}

/// The keys in the order of their insertion, except for the known keys, which are never evicted.
struct Queue {
    keys: Mutex<VecDeque<u64>>,
    max: usize,
    known: Range<u64>,
}

impl Queue {
    fn new(max: u64) -> Self {
        let known = first_known(max)..first_known(max) + KNOWN;
        let max = (max - KNOWN) as usize;
        Self { keys: Mutex::new(VecDeque::with_capacity(max + 1)), max, known }
    }

    /// Returns the key to evict.
    fn push(&self, key: u64) -> Option<u64> {
        if self.known.contains(&key) {
            return None;
        }
        let mut keys = self.keys.lock().unwrap();
        let evicted = if keys.len() >= self.max { keys.pop_front() } else { None };
        keys.push_back(key);
        evicted
    }
}

macro_rules! peer {
    ($Peer:ident, $Map:ty, $get:expr, $insert:expr, $remove:expr) => {
        struct $Peer {
            map: $Map,
            queue: Queue,
        }

        impl $Peer {
            fn new(max: u64) -> Self {
                Self { map: Default::default(), queue: Queue::new(max) }
            }
        }

        impl Map for $Peer {
            type Call = Box<dyn FnMut(u64) + Send>;

            fn call(self: &Arc<Self>) -> Self::Call {
                let this = self.clone();
                Box::new(move |key| {
                    let known: Option<Circuit> = $get(&this.map, key);
                    let mut circuit = known.unwrap_or_else(|| {
                        if let Some(evicted) = this.queue.push(key) {
                            $remove(&this.map, evicted);
                        }
                        let circuit = new_circuit();
                        $insert(&this.map, key, circuit.clone());
                        circuit
                    });
                    call(&mut circuit, key);
                })
            }
        }
    };
}

type LockedMap = RwLock<HashMap<u64, Circuit>>;
peer!(
    Locked,
    LockedMap,
    |map: &LockedMap, key| map.read().unwrap().get(&key).cloned(),
    |map: &LockedMap, key, circuit| map.write().unwrap().insert(key, circuit),
    |map: &LockedMap, key| map.write().unwrap().remove(&key)
);

type DashMap = dashmap::DashMap<u64, Circuit, RandomState>;
peer!(
    Dash,
    DashMap,
    |map: &DashMap, key| map.get(&key).map(|circuit| circuit.clone()),
    |map: &DashMap, key, circuit| map.insert(key, circuit),
    |map: &DashMap, key| map.remove(&key)
);

type PapayaMap = papaya::HashMap<u64, Circuit, RandomState>;
peer!(
    Papaya,
    PapayaMap,
    |map: &PapayaMap, key| map.pin().get(&key).cloned(),
    |map: &PapayaMap, key, circuit| map.pin().insert(key, circuit).is_none(),
    |map: &PapayaMap, key| map.pin().remove(&key).is_some()
);
