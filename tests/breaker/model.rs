//! A circuit as one would write it down on paper: lists of calls, and every event at its own time.

use std::time::Duration;

use buttress::{
    CircuitBreakerLayer, Trip,
    breaker::{OpenFor, State},
};

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum End {
    Success,
    Error,
    ServerError,
    Throttled,
    Cancel,
    /// Not an end: a good head, and a body that never comes to one.
    GoodHead,
}

#[derive(Clone, Copy, Debug)]
pub enum Rule {
    Consecutive(u32),
    /// So many tenths of the last calls failed.
    Failed {
        tenths: u32,
        over: u32,
        min: u32,
    },
    Slow {
        tenths: u32,
        over: u32,
        ms: u64,
    },
}

#[derive(Clone, Debug)]
pub struct Config {
    pub rules: Vec<Rule>,
    pub needed: u16,
    pub probes: u16,
    pub open_ms: u64,
    pub lease_ms: u64,
    /// Twice as long with each trip, up to four times, until it has been closed for 100 ms.
    pub backs_off: bool,
    /// No call is a probe.
    pub outside: bool,
}

const CALM: u64 = 100;

impl Config {
    pub fn layer(&self) -> CircuitBreakerLayer {
        let ms = Duration::from_millis;
        let rules = self.rules.iter().map(|rule| match *rule {
            Rule::Consecutive(failures) => Trip::consecutive(failures),
            Rule::Failed { tenths, over, min } => {
                Trip::failure_ratio(f64::from(tenths) / 10.0).over(over).min_calls(min)
            }
            Rule::Slow { tenths, over, ms: slow } => {
                Trip::slow_ratio(f64::from(tenths) / 10.0, ms(slow)).over(over).min_calls(1)
            }
        });
        let wait = match self.backs_off {
            false => OpenFor::fixed(ms(self.open_ms)),
            true => OpenFor::backoff(ms(self.open_ms), ms(self.open_ms * 4)).jitter(0.0),
        };
        let layer = CircuitBreakerLayer::new(Trip::any(rules))
            .half_open_of(self.needed, self.probes)
            .open_for(wait.calm_after(ms(CALM)))
            .probe_lease(ms(self.lease_ms));
        let layer = if self.outside { layer.probes_from_outside() } else { layer };
        layer.checked().expect("it can work")
    }

    /// From when on a call is slow to some rule.
    fn slow(&self) -> u64 {
        let slow = self.rules.iter().filter_map(|rule| match rule {
            Rule::Slow { ms, .. } => Some(*ms),
            _ => None,
        });
        slow.min().unwrap_or(u64::MAX)
    }
}

#[derive(Debug)]
pub struct Model {
    config: Config,
    pub now: u64,
    state: State,
    /// Which stay in a state this is.
    pub stay: usize,
    pub isolations: u32,
    pub opened: u64,
    pub run: u32,
    /// The last calls, for each rule: was it bad?
    lists: Vec<Vec<bool>>,
    since: u64,
    open_until: u64,
    trips: u32,
    passed: u16,
    failed: u16,
    /// Number of the call, end of its lease, whether it has seen a good head.
    pub probes: Vec<(usize, u64, bool)>,
}

impl Model {
    pub fn new(config: Config) -> Self {
        let lists = vec![Vec::new(); config.rules.len()];
        Self {
            config,
            now: 0,
            state: State::Closed,
            stay: 0,
            isolations: 0,
            opened: 0,
            run: 0,
            lists,
            since: 0,
            open_until: 0,
            trips: 0,
            passed: 0,
            failed: 0,
            probes: Vec::new(),
        }
    }

    pub fn state(&mut self) -> State {
        self.pass_time();
        if self.isolations > 0 { State::ForcedOpen } else { self.state }
    }

    /// Calls, failures, slow ones: in the fullest window of each kind.
    pub fn windows(&self) -> [u64; 3] {
        let mut most = [0; 3];
        for (rule, list) in self.config.rules.iter().zip(&self.lists) {
            let kind = match rule {
                Rule::Consecutive(_) => continue,
                Rule::Failed { .. } => 1,
                Rule::Slow { .. } => 2,
            };
            let bad = list.iter().filter(|bad| **bad).count() as u64;
            (most[0], most[kind]) = (most[0].max(list.len() as u64), most[kind].max(bad));
        }
        most
    }

    // ===== Changes =====

    fn to(&mut self, state: State, at: u64) {
        (self.state, self.since, self.passed, self.failed) = (state, at, 0, 0);
        self.stay += 1;
        self.probes.clear();
        if state == State::Closed {
            self.run = 0;
            self.lists.iter_mut().for_each(Vec::clear);
        }
    }

    fn open(&mut self, at: u64) {
        if self.state == State::Closed && at - self.since >= CALM {
            self.trips = 0;
        }
        let times = if self.config.backs_off { 1 << self.trips.min(2) } else { 1 };
        self.trips += 1;
        self.opened += 1;
        self.to(State::Open, at);
        self.open_until = at + self.config.open_ms * times;
    }

    pub fn force(&mut self, to: State) {
        if to != State::HalfOpen {
            self.trips = 0;
        }
        self.to(to, self.now);
    }

    fn decide(&mut self, at: u64) {
        if self.passed >= self.config.needed {
            self.to(State::Closed, at);
        } else if self.failed > self.config.probes - self.config.needed {
            self.open(at);
        }
    }

    fn pass_time(&mut self) {
        loop {
            if self.state == State::Open && self.now >= self.open_until {
                self.to(State::HalfOpen, self.open_until);
            }
            let first = self.probes.iter().map(|probe| probe.1).min();
            let Some(ends) = first.filter(|ends| *ends <= self.now) else { return };
            let at = self.probes.iter().position(|probe| probe.1 == ends).unwrap();
            match self.probes.remove(at).2 {
                true => self.passed += 1,
                false => self.failed += 1,
            }
            self.decide(ends);
        }
    }

    // ===== Calls =====

    /// Whether the call of this number goes.
    pub fn call(&mut self, number: usize) -> bool {
        match self.state() {
            State::Closed | State::ForcedClosed => true,
            State::Open | State::ForcedOpen => false,
            State::HalfOpen => {
                let taken = usize::from(self.passed + self.failed) + self.probes.len();
                let goes = !self.config.outside && taken < usize::from(self.config.probes);
                if goes {
                    self.probes.push((number, self.now + self.config.lease_ms, false));
                }
                goes
            }
        }
    }

    pub fn end(&mut self, number: usize, stay: usize, end: End, took: u64) {
        self.pass_time();
        if stay != self.stay {
            return;
        }
        match self.state {
            State::Closed => self.count(end, took),
            State::HalfOpen => {
                let Some(at) = self.probes.iter().position(|probe| probe.0 == number) else {
                    return;
                };
                if end == End::GoodHead {
                    self.probes[at].2 = took < self.config.slow();
                    return;
                }
                self.probes.remove(at);
                self.probed(end, took);
            }
            State::Open | State::ForcedOpen | State::ForcedClosed => {}
        }
    }

    pub fn told(&mut self, end: End) {
        self.pass_time();
        match self.state {
            State::Closed => self.count(end, 0),
            State::HalfOpen => self.probed(end, 0),
            _ => {}
        }
    }

    fn probed(&mut self, end: End, took: u64) {
        let slow = took >= self.config.slow();
        match end {
            End::Success if !slow => self.passed += 1,
            End::Cancel if !slow => return,
            _ => self.failed += 1,
        }
        self.decide(self.now);
    }

    fn count(&mut self, end: End, took: u64) {
        let slow = took >= self.config.slow();
        let failed = match end {
            End::Success => Some(false),
            End::Error | End::ServerError => Some(true),
            End::Cancel if slow => None,
            End::Throttled | End::Cancel | End::GoodHead => return,
        };
        match failed {
            Some(true) => self.run += 1,
            Some(false) => self.run = 0,
            None => {}
        }
        let mut trips = false;
        for (rule, list) in self.config.rules.iter().zip(&mut self.lists) {
            let (over, bad, asked, tenths, min) = match *rule {
                Rule::Consecutive(limit) => {
                    trips |= failed == Some(true) && self.run >= limit;
                    continue;
                }
                Rule::Failed { tenths, over, min } => {
                    (over, failed, failed == Some(true), tenths, min)
                }
                Rule::Slow { tenths, over, ms } => {
                    let slow = took >= ms;
                    (over, (failed.is_some() || slow).then_some(slow), slow, tenths, 1)
                }
            };
            list.extend(bad);
            if list.len() > over as usize {
                list.remove(0);
            }
            let bad = list.iter().filter(|bad| **bad).count();
            trips |=
                asked && list.len() >= min as usize && bad * 10 >= list.len() * tenths as usize;
        }
        if trips {
            self.open(self.now);
        }
    }
}
