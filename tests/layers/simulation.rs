//! A server in virtual time, behind an adaptive limit: a discrete-event simulation, exact and repeatable.
//!
//! The server has a number of workers. Each worker serves one call at a time, and calls without a free worker wait in
//! one queue. Calls arrive at random, independently of the earlier ones (open loop). The limit rejects a call that
//! arrives when it is reached.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, VecDeque},
    time::Duration,
};

use buttress::limit::adaptive::{Algorithm, Sample};

/// The distribution of the service time around its mean.
#[derive(Clone, Copy, Debug)]
pub enum Spread {
    /// Uniform between 50 % and 150 % of the mean.
    Even,
    Exponential,
    /// One call in ten takes 91 times as long as the others, like a cache miss.
    Misses,
}

/// The conditions of a run, from the time `from` in seconds.
#[derive(Clone, Copy, Debug)]
pub struct Phase {
    pub from: f64,
    pub workers: usize,
    /// Mean service time in milliseconds.
    pub service: f64,
    /// Calls per second.
    pub offered: f64,
}

pub const STEADY: Phase = Phase { from: 0.0, workers: 20, service: 10.0, offered: 4000.0 };

#[derive(Clone, Debug)]
pub struct World {
    pub phases: Vec<Phase>,
    pub spread: Spread,
    /// Seconds for which a caller waits for its response. It then calls once more: immediately, or 100 ms after a
    /// rejection. The server still works on abandoned calls.
    pub patience: Option<f64>,
    pub seed: u64,
}

/// One second of the run.
#[derive(Clone, Debug, Default)]
pub struct Second {
    /// The limit at the end of the second.
    pub limit: u32,
    pub lowest: u32,
    pub highest: u32,
    /// Responses whose caller still waited.
    pub good: u32,
    pub refused: u32,
    /// Milliseconds from the admission of each call to its response.
    pub latencies: Vec<f32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Phase(usize),
    Arrive,
    Again(u64),
    Done(Job),
    GiveUp(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Job {
    caller: u64,
    came: u64,
    in_flight: u32,
}

const SECOND: f64 = 1e9;

struct Run<'a> {
    world: &'a World,
    algorithm: Option<Box<dyn Algorithm>>,
    phase: Phase,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    number: u64,
    callers: u64,
    /// The callers without a response, and whether each may call again. Empty if `patience` is not set.
    waits: HashMap<u64, bool>,
    in_flight: u32,
    busy: usize,
    line: VecDeque<Job>,
    dice: fastrand::Rng,
    second: Second,
}

/// Returns the seconds of a run. Without an algorithm there is no limit.
pub fn run(world: &World, algorithm: Option<Box<dyn Algorithm>>, seconds: usize) -> Vec<Second> {
    let mut run = Run {
        world,
        algorithm,
        phase: world.phases[0],
        events: BinaryHeap::new(),
        number: 0,
        callers: 0,
        waits: HashMap::new(),
        in_flight: 0,
        busy: 0,
        line: VecDeque::new(),
        dice: fastrand::Rng::with_seed(world.seed),
        second: Second::default(),
    };
    for (number, phase) in world.phases.iter().enumerate() {
        run.at((phase.from * SECOND) as u64, Event::Phase(number));
    }
    run.at(1, Event::Arrive);
    let mut told = Vec::with_capacity(seconds);
    run.begin_second();
    while let Some(Reverse((now, _, event))) = run.events.pop() {
        while now >= (told.len() as u64 + 1) * SECOND as u64 {
            run.second.limit = run.limit();
            told.push(std::mem::take(&mut run.second));
            run.begin_second();
            if told.len() == seconds {
                return told;
            }
        }
        run.step(now, event);
    }
    unreachable!("each arrival schedules the next one")
}

impl Run<'_> {
    fn at(&mut self, when: u64, event: Event) {
        self.number += 1;
        self.events.push(Reverse((when, self.number, event)));
    }

    fn limit(&self) -> u32 {
        self.algorithm.as_ref().map_or(u32::MAX, |algorithm| algorithm.limit())
    }

    fn begin_second(&mut self) {
        let limit = self.limit();
        self.second = Second { lowest: limit, highest: limit, ..Second::default() };
    }

    fn exponential(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.dice.f64()).ln()
    }

    fn step(&mut self, now: u64, event: Event) {
        match event {
            Event::Phase(number) => {
                self.phase = self.world.phases[number];
                self.serve(now);
            }
            Event::Arrive => {
                let pause = self.exponential(SECOND / self.phase.offered);
                self.at(now + pause as u64 + 1, Event::Arrive);
                let caller = self.callers;
                self.callers += 1;
                if self.world.patience.is_some() {
                    self.waits.insert(caller, true);
                }
                self.come(now, caller);
            }
            Event::Again(caller) => self.come(now, caller),
            Event::GiveUp(caller) => self.unanswered(now, caller, 0),
            Event::Done(job) => {
                self.busy -= 1;
                self.in_flight -= 1;
                self.answered(now, job);
                self.serve(now);
            }
        }
    }

    fn come(&mut self, now: u64, caller: u64) {
        if self.in_flight >= self.limit() {
            self.second.refused += 1;
            self.unanswered(now, caller, 100_000_000);
            return;
        }
        if let Some(patience) = self.world.patience {
            self.at(now + (patience * SECOND) as u64, Event::GiveUp(caller));
        }
        self.in_flight += 1;
        self.line.push_back(Job { caller, came: now, in_flight: self.in_flight });
        self.serve(now);
    }

    fn unanswered(&mut self, now: u64, caller: u64, pause: u64) {
        match self.waits.get_mut(&caller) {
            Some(again) if *again => {
                *again = false;
                self.at(now + pause, Event::Again(caller));
            }
            Some(_) => drop(self.waits.remove(&caller)),
            None => {}
        }
    }

    fn serve(&mut self, now: u64) {
        while self.busy < self.phase.workers {
            let Some(job) = self.line.pop_front() else { return };
            self.busy += 1;
            let mean = self.phase.service * SECOND / 1e3;
            let takes = match self.world.spread {
                Spread::Even => mean * (0.5 + self.dice.f64()),
                Spread::Exponential => self.exponential(mean),
                Spread::Misses if self.dice.u8(..10) == 0 => 9.1 * mean,
                Spread::Misses => 0.1 * mean,
            };
            self.at(now + takes as u64 + 1, Event::Done(job));
        }
    }

    fn answered(&mut self, now: u64, job: Job) {
        if self.world.patience.is_none() || self.waits.remove(&job.caller).is_some() {
            self.second.good += 1;
        }
        self.second.latencies.push(((now - job.came) as f64 / 1e6) as f32);
        let Some(algorithm) = &mut self.algorithm else { return };
        let latency = Duration::from_nanos(now - job.came);
        let _ =
            algorithm.on_sample(&Sample::new(Duration::from_nanos(now), latency, job.in_flight));
        let limit = algorithm.limit();
        self.second.lowest = self.second.lowest.min(limit);
        self.second.highest = self.second.highest.max(limit);
    }
}

// ===== Evaluation of a run =====

/// Returns the number of good responses per second.
pub fn goodput(seconds: &[Second]) -> f64 {
    seconds.iter().map(|second| f64::from(second.good)).sum::<f64>() / seconds.len() as f64
}

pub fn mean_limit(seconds: &[Second]) -> f64 {
    seconds.iter().map(|second| f64::from(second.limit)).sum::<f64>() / seconds.len() as f64
}

/// Returns the latency in milliseconds that this share of the calls did not exceed.
pub fn quantile(seconds: &[Second], share: f64) -> f32 {
    let mut all: Vec<f32> = seconds.iter().flat_map(|second| &second.latencies).copied().collect();
    if all.is_empty() {
        return f32::NAN;
    }
    let place = (((all.len() - 1) as f64) * share) as usize;
    *all.select_nth_unstable_by(place, f32::total_cmp).1
}
