//! A naive model of a circuit: it keeps lists of calls and applies every change at its own time.

use std::{mem, time::Duration};

use buttress::{
    CircuitBreakerLayer, Trip,
    breaker::{CircuitState, OpenDuration},
};

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum End {
    Success,
    Error,
    ServerError,
    Throttled,
    Cancel,
    /// Cancelled after the upstream had had the request for `count_cancelled_after`. The model derives it from
    /// `Cancel`.
    NoResponse,
    /// Not an end: a good head, followed by a body that does not end.
    GoodHead,
}

#[derive(Clone, Copy, Debug)]
pub enum Rule {
    Consecutive(u32),
    /// Trips if this many tenths of the last `over` calls failed.
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
    /// Trips if this many tenths of the calls in ten stretches of `stretch` milliseconds failed.
    Within {
        tenths: u32,
        stretch: u64,
        min: u32,
    },
}

impl Rule {
    /// The same rule with other thresholds.
    fn adjusted(self, by: u32) -> Self {
        let tenths = 1 + by % 10;
        match self {
            Self::Consecutive(_) => Self::Consecutive(1 + by % 4),
            Self::Failed { over, .. } => Self::Failed { tenths, over, min: 1 + by % over },
            Self::Slow { over, .. } => Self::Slow { tenths, over, ms: 1 + u64::from(by) % 60 },
            Self::Within { stretch, .. } => Self::Within { tenths, stretch, min: 1 + by % 12 },
        }
    }
}

#[derive(Clone, Debug)]
pub struct Config {
    pub rules: Vec<Rule>,
    pub needed: u16,
    pub probes: u16,
    pub open_ms: u64,
    pub lease_ms: u64,
    /// The open time doubles with each trip, up to four times `open_ms`, until the circuit has been closed for 100 ms.
    pub backs_off: bool,
    /// Only recorded outcomes decide in half-open: no call is a probe.
    pub outside: bool,
    pub ramp_ms: u64,
    pub count_cancelled_ms: Option<u64>,
}

const CALM: u64 = 100;

impl Config {
    pub fn trip(&self) -> Trip {
        let ms = Duration::from_millis;
        let rules = self.rules.iter().map(|rule| match *rule {
            Rule::Consecutive(failures) => Trip::consecutive(failures),
            Rule::Failed { tenths, over, min } => {
                Trip::failure_ratio(f64::from(tenths) / 10.0).over(over).min_calls(min)
            }
            Rule::Slow { tenths, over, ms: slow } => {
                Trip::slow_ratio(f64::from(tenths) / 10.0, ms(slow)).over(over).min_calls(1)
            }
            Rule::Within { tenths, stretch, min } => {
                let ratio = Trip::failure_ratio(f64::from(tenths) / 10.0);
                ratio.within(ms(stretch * STRETCHES)).min_calls(min)
            }
        });
        Trip::any(rules)
    }

    pub fn wait(&self) -> OpenDuration {
        let ms = Duration::from_millis;
        let wait = match self.backs_off {
            false => OpenDuration::fixed(ms(self.open_ms)),
            true => OpenDuration::backoff(ms(self.open_ms), ms(self.open_ms * 4)).jitter(0.0),
        };
        wait.reset_after(ms(CALM))
    }

    pub fn layer(&self) -> CircuitBreakerLayer {
        let layer = CircuitBreakerLayer::new(self.trip())
            .half_open_of(self.needed, self.probes)
            .open_for(self.wait())
            .ramp(Duration::from_millis(self.ramp_ms))
            .probe_timeout(Duration::from_millis(self.lease_ms))
            .count_cancelled_after(self.count_cancelled_ms.map(Duration::from_millis));
        let layer = if self.outside { layer.external_probes() } else { layer };
        layer.checked().expect("a valid configuration")
    }

    /// The duration from which on a call is slow for at least one rule.
    fn slow(&self) -> u64 {
        let slow = self.rules.iter().filter_map(|rule| match rule {
            Rule::Slow { ms, .. } => Some(*ms),
            _ => None,
        });
        slow.min().unwrap_or(u64::MAX)
    }
}

/// The number of stretches in a window of time.
const STRETCHES: u64 = 10;

/// The decision about a new call.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goes {
    /// Admitted and counted in this stay.
    In(usize),
    /// Admitted in shadow mode and not counted.
    Shadowed,
    Refused,
    /// Admitted at random during a ramp, and then counted in this stay.
    Perhaps(usize),
}

/// A call in a window: whether it was bad, and the number of its stretch of time.
type Past = (bool, u64);

/// A snapshot of the model.
#[derive(Clone, Debug)]
pub struct Taken {
    state: CircuitState,
    left: u64,
    trips: u32,
    run: u32,
    lists: Vec<Vec<Past>>,
}

#[derive(Debug)]
pub struct Model {
    pub config: Config,
    pub shadow: bool,
    /// The number of calls that would have been rejected without shadow mode.
    pub shadowed: u64,
    pub refused: u64,
    pub now: u64,
    state: CircuitState,
    /// The number of the current stay in a state, like the generation of a circuit.
    pub stay: usize,
    pub isolations: u32,
    pub opened: u64,
    pub run: u32,
    /// The last calls of each rule.
    lists: Vec<Vec<Past>>,
    since: u64,
    /// Whether probes closed the circuit, which starts a ramp. A change by hand starts none.
    ramps: bool,
    open_until: u64,
    trips: u32,
    passed: u16,
    failed: u16,
    /// For each probe: the number of the call, the time at which it times out, whether its head was good.
    pub probes: Vec<(usize, u64, bool)>,
}

impl Model {
    pub fn new(config: Config) -> Self {
        let lists = vec![Vec::new(); config.rules.len()];
        Self {
            config,
            shadow: false,
            shadowed: 0,
            refused: 0,
            now: 0,
            state: CircuitState::Closed,
            stay: 0,
            isolations: 0,
            opened: 0,
            run: 0,
            lists,
            since: 0,
            ramps: false,
            open_until: 0,
            trips: 0,
            passed: 0,
            failed: 0,
            probes: Vec::new(),
        }
    }

    pub fn state(&mut self) -> CircuitState {
        self.pass_time();
        if self.isolations > 0 { CircuitState::ForcedOpen } else { self.state }
    }

    /// The numbers of half-open probes that passed and failed.
    pub fn progress(&self) -> (u16, u16) {
        (self.passed, self.failed)
    }

    /// The maximum number of calls, failures and slow calls over the windows of that kind.
    pub fn windows(&mut self) -> [u64; 3] {
        self.forget();
        let mut most = [0; 3];
        for (rule, list) in self.config.rules.iter().zip(&self.lists) {
            let kind = match rule {
                Rule::Consecutive(_) => continue,
                Rule::Failed { .. } | Rule::Within { .. } => 1,
                Rule::Slow { .. } => 2,
            };
            let bad = bad(list) as u64;
            (most[0], most[kind]) = (most[0].max(list.len() as u64), most[kind].max(bad));
        }
        most
    }

    /// Removes the calls that have left their window.
    fn forget(&mut self) {
        for (rule, list) in self.config.rules.iter().zip(&mut self.lists) {
            if let Rule::Within { stretch, .. } = rule {
                list.retain(|(_, at)| at + STRETCHES > self.now / stretch);
            }
        }
    }

    // ===== Changes =====

    fn to(&mut self, state: CircuitState, at: u64) {
        (self.state, self.since, self.passed, self.failed) = (state, at, 0, 0);
        self.ramps = false;
        self.stay += 1;
        self.probes.clear();
        if state == CircuitState::Closed {
            self.run = 0;
            self.lists.iter_mut().for_each(Vec::clear);
        }
    }

    fn open(&mut self, at: u64) {
        if self.state == CircuitState::Closed && at - self.since >= CALM {
            self.trips = 0;
        }
        let times = if self.config.backs_off { 1 << self.trips.min(2) } else { 1 };
        self.trips += 1;
        self.opened += 1;
        self.to(CircuitState::Open, at);
        self.open_until = at + self.config.open_ms * times;
    }

    pub fn force(&mut self, to: CircuitState) {
        if to != CircuitState::HalfOpen {
            self.trips = 0;
        }
        self.to(to, self.now);
    }

    pub fn adjust(&mut self, by: u32) {
        self.config.rules.iter_mut().for_each(|rule| *rule = rule.adjusted(by));
    }

    pub fn take(&mut self) -> Taken {
        self.pass_time();
        self.forget();
        Taken {
            state: self.state,
            left: if self.state == CircuitState::Open { self.open_until - self.now } else { 0 },
            trips: self.trips,
            run: self.run,
            lists: self.lists.clone(),
        }
    }

    /// A snapshot has the number of calls of each kind and not their order, so the bad calls are the newest ones.
    pub fn restore(&mut self, taken: &Taken) {
        self.to(taken.state, self.now);
        (self.open_until, self.trips) = (self.now + taken.left, taken.trips);
        (self.run, self.lists) = (taken.run, taken.lists.clone());
        for (rule, list) in self.config.rules.iter().zip(&mut self.lists) {
            list.sort_unstable();
            if let Rule::Within { stretch, .. } = rule {
                list.iter_mut().for_each(|(_, at)| *at = self.now / stretch);
            }
        }
    }

    fn decide(&mut self, at: u64) {
        if self.passed >= self.config.needed {
            self.to(CircuitState::Closed, at);
            self.ramps = true;
        } else if self.failed > self.config.probes - self.config.needed {
            self.open(at);
        }
    }

    fn pass_time(&mut self) {
        loop {
            if self.state == CircuitState::Open && self.now >= self.open_until {
                self.to(CircuitState::HalfOpen, self.open_until);
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

    /// Decides about the call with this number.
    pub fn call(&mut self, number: usize) -> Goes {
        let state = self.state();
        let ramping = mem::take(&mut self.ramps) && self.now - self.since < self.config.ramp_ms;
        self.ramps = ramping;
        let goes = match state {
            CircuitState::Closed if ramping => return Goes::Perhaps(self.stay),
            CircuitState::Closed | CircuitState::ForcedClosed => true,
            CircuitState::HalfOpen => {
                let taken = usize::from(self.passed + self.failed) + self.probes.len();
                let goes = !self.config.outside && taken < usize::from(self.config.probes);
                if goes {
                    self.probes.push((number, self.now + self.config.lease_ms, false));
                }
                goes
            }
            _ => false,
        };
        match goes {
            true => Goes::In(self.stay),
            false if self.shadow => {
                self.shadowed += 1;
                Goes::Shadowed
            }
            false => {
                self.refused += 1;
                Goes::Refused
            }
        }
    }

    pub fn end(&mut self, number: usize, stay: Option<usize>, end: End, took: u64) {
        let counts = self.config.count_cancelled_ms.is_some_and(|ms| took >= ms);
        let end = if end == End::Cancel && counts { End::NoResponse } else { end };
        self.pass_time();
        if stay != Some(self.stay) {
            return;
        }
        match self.state {
            CircuitState::Closed => self.count(end, took),
            CircuitState::HalfOpen => {
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
            _ => {}
        }
    }

    pub fn told(&mut self, end: End) {
        self.pass_time();
        match self.state {
            CircuitState::Closed => self.count(end, 0),
            CircuitState::HalfOpen => self.probed(end, 0),
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
            End::Error | End::ServerError | End::NoResponse => Some(true),
            End::Cancel if slow => None,
            End::Throttled | End::Cancel | End::GoodHead => return,
        };
        match failed {
            Some(true) => self.run += 1,
            Some(false) => self.run = 0,
            None => {}
        }
        self.forget();
        let mut trips = false;
        for (rule, list) in self.config.rules.iter().zip(&mut self.lists) {
            let mut at = 0;
            let (over, was_bad, asked, tenths, min) = match *rule {
                Rule::Consecutive(limit) => {
                    trips |= failed == Some(true) && self.run >= limit;
                    continue;
                }
                Rule::Failed { tenths, over, min } => {
                    (over, failed, failed == Some(true), tenths, min)
                }
                Rule::Slow { tenths, over, ms } => {
                    let slow = took >= ms;
                    let ended = failed.is_some() && end != End::NoResponse;
                    (over, (ended || slow).then_some(slow), slow, tenths, 1)
                }
                Rule::Within { tenths, stretch, min } => {
                    at = self.now / stretch;
                    (u32::MAX, failed, failed == Some(true), tenths, min)
                }
            };
            list.extend(was_bad.map(|bad| (bad, at)));
            if list.len() > over as usize {
                list.remove(0);
            }
            trips |= asked
                && list.len() >= min as usize
                && bad(list) * 10 >= list.len() * tenths as usize;
        }
        if trips {
            self.open(self.now);
        }
    }
}

fn bad(list: &[Past]) -> usize {
    list.iter().filter(|(bad, _)| *bad).count()
}
