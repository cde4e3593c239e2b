//! Circuit breakers around an upstream that fails all calls, fails some calls or is slow, and then recovers.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use http::StatusCode;
use tokio::time::{Instant, sleep};

use crate::{
    ours::{RING, WAIT, breaker, ratio_breaker, slow_breaker},
    peers::{
        failsafe_breaker, failsafe_ratio_breaker, none, recloser_breaker, recloser_ratio_breaker,
        tr_breaker, tr_ratio_breaker, tr_slow_breaker,
    },
    picture::Chart,
    report::{Case, Play, Row, Seen, less, more, row},
    traffic::{Ended, How, Traffic, by_second, goodput, offer},
    world::{Client, Clock, Upstream, ms, play, secs, status},
};

const PER_SECOND: f64 = 100.0;
/// The seconds at which the outage begins, the outage ends and the run ends.
const GOES: f64 = 5.0;
const BACK: f64 = 15.0;
const END: f64 = 25.0;

/// The seconds at which calls reached the upstream, and at which it sent a successful response.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<(Vec<f64>, Vec<f64>)>>);

impl Log {
    fn began(&self, from: f64, to: f64) -> usize {
        let log = self.0.lock().expect("not poisoned");
        log.0.iter().filter(|at| (from..to).contains(*at)).count()
    }

    fn well(&self, from: f64, to: f64) -> usize {
        let log = self.0.lock().expect("not poisoned");
        log.1.iter().filter(|at| (from..to).contains(*at)).count()
    }
}

struct Run {
    ended: Vec<Ended>,
    log: Log,
}

/// The behaviour of the upstream in the outage. Outside of it, a call takes 5 ms and succeeds.
#[derive(Clone, Copy)]
struct Gone {
    takes: Duration,
    /// The share of the calls that fail.
    failing: f64,
}

async fn run(client: Client, gone: Gone, patience: Duration) -> Run {
    let (log, is_gone, start) = (Log::default(), Arc::new(AtomicBool::new(false)), Instant::now());
    let (seen, reads) = (log.clone(), is_gone.clone());
    let dice = Mutex::new(fastrand::Rng::with_seed(5));
    let upstream = Upstream::new(move || {
        let now = start.elapsed().as_secs_f64();
        seen.0.lock().expect("not poisoned").0.push(now);
        let (seen, is_gone) = (seen.clone(), reads.load(Relaxed));
        let fails = is_gone && dice.lock().expect("not poisoned").f64() < gone.failing;
        async move {
            sleep(if is_gone { gone.takes } else { ms(5) }).await;
            if fails {
                return status(StatusCode::SERVICE_UNAVAILABLE);
            }
            seen.0.lock().expect("not poisoned").1.push(start.elapsed().as_secs_f64());
            status(StatusCode::OK)
        }
    });
    let script = async {
        sleep(Duration::from_secs_f64(GOES)).await;
        is_gone.store(true, Relaxed);
        sleep(Duration::from_secs_f64(BACK - GOES)).await;
        is_gone.store(false, Relaxed);
    };
    let length = Duration::from_secs_f64(END);
    let traffic = Traffic { per_second: PER_SECOND, length, patience, random: false };
    let call = client(upstream);
    let (ended, ()) = tokio::join!(offer(&call, traffic), script);
    Run { ended, log }
}

impl Run {
    fn refusals(&self, from: f64, to: f64) -> impl Iterator<Item = f64> + '_ {
        let rejected = self.ended.iter().filter(|one| one.how == How::Rejected);
        rejected.map(|one| one.began).filter(move |at| (from..to).contains(at))
    }

    /// Returns the number of calls that the upstream received before the first rejection in the outage. If the client
    /// rejects no call, these are all calls of the outage.
    fn to_open(&self) -> f64 {
        let first = self.refusals(GOES, BACK).fold(BACK, f64::min);
        self.log.began(GOES, first) as f64
    }

    fn sent(&self) -> f64 {
        self.log.began(GOES, BACK) as f64
    }

    /// Returns the number of successful responses after the outage up to the last rejection, plus the one that closes
    /// the circuit.
    fn to_close(&self) -> f64 {
        let last = self.refusals(BACK, END).fold(f64::NAN, f64::max);
        if last.is_nan() { f64::NAN } else { 1.0 + self.log.well(BACK, last) as f64 }
    }

    /// Returns the seconds from the end of the outage to the beginning of the last call that did not succeed.
    fn back_after(&self) -> f64 {
        let bad = self.ended.iter().filter(|one| one.how != How::Good && one.began > GOES);
        (bad.map(|one| one.began).fold(BACK, f64::max) - BACK).max(0.0)
    }

    fn lines(&self) -> Vec<Vec<(f64, f64)>> {
        let sent = by_second(END as usize, |from, to| self.log.began(from, to) as f64);
        vec![sent, by_second(END as usize, |from, to| goodput(&self.ended, from, to))]
    }
}

fn charts(subtitle: &str) -> Vec<Chart> {
    let chart = |title, most| Chart { title, subtitle: subtitle.to_owned(), x: "seconds", most };
    vec![
        chart("Calls sent to the upstream, per second", 120.0),
        chart("Successful responses per second", 120.0),
    ]
}

type Candidate = (&'static str, Clock, Client);

fn rows<const N: usize>(
    candidates: [Candidate; N],
    gone: Gone,
    patience: Duration,
    values: fn(&Run) -> Vec<f64>,
) -> Vec<Row<Play>> {
    let all = candidates.map(|(who, clock, client)| {
        row(who, clock, move || {
            let run = play(clock, run(client, gone, patience));
            Seen { values: values(&run), lines: run.lines() }
        })
    });
    all.into()
}

pub fn dead_upstream() -> Case<Play> {
    let candidates: [Candidate; 5] = [
        ("buttress", Clock::Virtual, breaker),
        ("tower-resilience", Clock::Wall, tr_breaker),
        ("failsafe", Clock::Wall, failsafe_breaker),
        ("recloser", Clock::Wall, recloser_breaker),
        ("none", Clock::Virtual, none),
    ];
    let gone = Gone { takes: ms(5), failing: 1.0 };
    let about = format!(
        "{PER_SECOND} calls/s; from {GOES} s to {BACK} s all fail. Breakers: five failures in a row, open for {} s",
        WAIT.as_secs()
    );
    Case {
        name: "dead_upstream",
        columns: vec![
            less("failed_to_open", "calls").must(10.0),
            less("sent", "calls"),
            less("probes_to_close", "calls").must(1.0),
            less("back_after", "s"),
        ],
        rows: rows(candidates, gone, secs(10), |run| {
            vec![run.to_open(), run.sent(), run.to_close(), run.back_after()]
        }),
        charts: charts(&about),
        note: "",
        about,
    }
}

pub fn half_dead_upstream() -> Case<Play> {
    const FAILING: f64 = 0.7;
    let candidates: [Candidate; 5] = [
        ("buttress", Clock::Virtual, ratio_breaker),
        ("tower-resilience", Clock::Wall, tr_ratio_breaker),
        ("failsafe", Clock::Wall, failsafe_ratio_breaker),
        ("recloser", Clock::Wall, recloser_ratio_breaker),
        ("none", Clock::Virtual, none),
    ];
    let gone = Gone { takes: ms(5), failing: FAILING };
    let about = format!(
        "{PER_SECOND} calls/s; from {GOES} s to {BACK} s {} % fail. Breakers: failure ratio of 50 % over {RING} calls, open for {} s",
        100.0 * FAILING,
        WAIT.as_secs()
    );
    Case {
        name: "half_dead_upstream",
        columns: vec![
            less("sent_to_open", "calls"),
            less("sent", "calls"),
            more("good", "per_s"),
            less("back_after", "s"),
        ],
        rows: rows(candidates, gone, secs(10), |run| {
            let good = goodput(&run.ended, GOES, BACK);
            vec![run.to_open(), run.sent(), good, run.back_after()]
        }),
        charts: charts(&about),
        note: "A client whose circuit stays closed receives every successful response of the upstream. The window of tower-resilience does not slide: it contains all calls since the start. The average of failsafe decays slowly.",
        about,
    }
}

/// The upstream is slow, and callers give up, so the breakers see cancelled calls.
pub fn slow_upstream() -> Case<Play> {
    let candidates: [Candidate; 5] = [
        ("buttress", Clock::Virtual, slow_breaker),
        ("tower-resilience", Clock::Wall, tr_slow_breaker),
        ("failsafe", Clock::Wall, failsafe_breaker),
        ("recloser", Clock::Wall, recloser_breaker),
        ("none", Clock::Virtual, none),
    ];
    let gone = Gone { takes: secs(3), failing: 0.0 };
    let patience = secs(1);
    let about = format!(
        "{PER_SECOND} calls/s; from {GOES} s to {BACK} s a call takes 3 s, and callers give up after 1 s"
    );
    Case {
        name: "slow_upstream",
        columns: vec![
            less("sent", "calls"),
            less("waited", "ms"),
            less("back_after", "s"),
            more("good_after", "per_s"),
        ],
        rows: rows(candidates, gone, patience, |run| {
            let then = run.ended.iter().filter(|one| (GOES..BACK).contains(&one.began));
            let waits: Vec<f64> = then.map(|one| one.took).collect();
            let waited = 1e3 * waits.iter().sum::<f64>() / waits.len() as f64;
            vec![run.sent(), waited, run.back_after(), goodput(&run.ended, BACK, END)]
        }),
        charts: charts(&about),
        note: "The peers do not count a cancelled call as a failure. Their circuits stay closed, so they have nothing to recover from.",
        about,
    }
}
