//! The claims about the protected client, and the values measured for both clients.

use std::time::Duration;

use crate::{
    clients::LIMIT,
    live::Ms,
    run::{Run, Side},
    script::Phase,
    tally::{self, Answer, Call},
};

pub struct Claim {
    pub says: &'static str,
    pub measured: String,
    pub holds: bool,
}

pub fn claims(run: &Run) -> Vec<Claim> {
    let (bare, protected) = (&run.bare, &run.protected);
    vec![
        covered_blips(bare, protected),
        slow_goodput(bare, protected),
        slow_answers(bare, protected),
        bounded_upstream(bare, protected),
        spared_upstream(bare, protected),
        nobody_sacrificed(bare, protected),
        waited_in_vain(bare, protected),
        recovery(bare, protected),
    ]
}

/// Retries hide the occasional failures of a healthy upstream.
fn covered_blips(bare: &Side, protected: &Side) -> Claim {
    let seen = |side: &Side| {
        let stray = |call: &&Call| {
            Phase::at(call.at).is_healthy() && matches!(call.answer, Answer::Status(503))
        };
        side.calls.iter().filter(stray).count()
    };
    let (bare, protected) = (seen(bare), seen(protected));
    Claim {
        says: "healthy: retries hide at least three of four occasional 503s from the callers",
        measured: format!("{protected} seen against {bare}"),
        holds: bare > 0 && protected * 4 <= bare,
    }
}

/// The remaining capacity of the upstream serves calls whose callers still wait.
fn slow_goodput(bare: &Side, protected: &Side) -> Claim {
    let good = |side: &Side| tally::good(&tally::made_in(&side.calls, Phase::Slow));
    let (bare, protected) = (good(bare), good(protected));
    Claim {
        says: "slow: at least twice as many calls succeed",
        measured: format!("{protected} against {bare}"),
        holds: protected > 0 && protected >= bare * 2,
    }
}

fn slow_answers(bare: &Side, protected: &Side) -> Claim {
    let p50 = |side: &Side| tally::percentile(&tally::made_in(&side.calls, Phase::Slow), 0.5);
    let (bare, protected) = (p50(bare), p50(protected));
    Claim {
        says: "slow: calls end, with success or failure, within half of the time (p50)",
        measured: format!("{} against {}", Ms(protected), Ms(bare)),
        holds: protected * 2 <= bare,
    }
}

fn bounded_upstream(bare: &Side, protected: &Side) -> Claim {
    // A call whose caller gives up releases its permit, while the upstream still works on the request.
    let gave_up = protected.calls.iter().filter(|call| call.answer == Answer::TimedOut).count();
    let (bare, protected) = (bare.meter.most_held(), protected.meter.most_held());
    Claim {
        says: "whole run: the upstream holds no more requests than the limit allows, and at most a tenth of the bare side",
        measured: format!(
            "{protected} at most, limit {LIMIT} and {gave_up} given up, against {bare}"
        ),
        holds: protected <= LIMIT + gave_up && protected * 10 <= bare,
    }
}

fn spared_upstream(bare: &Side, protected: &Side) -> Claim {
    let sent = |side: &Side| -> usize {
        Phase::ALL.into_iter().filter(|p| p.is_outage()).map(|p| side.tally.sent(p)).sum()
    };
    let (bare, protected) = (sent(bare), sent(protected));
    Claim {
        says: "503 and refusing: at most an eighth of the attempts, including probes and retries",
        measured: format!("{protected} against {bare}"),
        holds: protected * 8 <= bare,
    }
}

/// A circuit breaker alone would use calls as half-open probes. With the health probe no call is used.
fn nobody_sacrificed(bare: &Side, protected: &Side) -> Claim {
    let [bare, protected] = [bare, protected].map(|side| side.tally.attempts(Phase::Refusing));
    Claim {
        says: "refusing: only the health probe calls the upstream, and no call is used as a probe",
        measured: format!("{protected} attempts at calls against {bare}"),
        holds: protected == 0 && bare > 0,
    }
}

fn waited_in_vain(bare: &Side, protected: &Side) -> Claim {
    let vain = |side: &Side| -> Duration {
        side.calls.iter().filter(|call| !call.is_good()).map(Call::took).sum()
    };
    let (bare, protected) = (vain(bare), vain(protected));
    Claim {
        says: "whole run: callers wait at most a third of the time for calls that fail",
        measured: format!(
            "{:.0} s against {:.0} s, summed over all callers",
            protected.as_secs_f64(),
            bare.as_secs_f64()
        ),
        holds: protected * 3 <= bare,
    }
}

fn recovery(bare: &Side, protected: &Side) -> Claim {
    let [bare, protected] = [bare, protected].map(|side| tally::time_to_recover(&side.calls));
    let told = |time: Option<Duration>| {
        time.map_or("never".into(), |t| format!("{:.2} s", t.as_secs_f64()))
    };
    Claim {
        says: "healthy again: recovered within 2 s, and within half of the time",
        measured: format!("{} against {}", told(protected), told(bare)),
        holds: protected.is_some_and(|protected| {
            protected <= Duration::from_secs(2) && bare.is_none_or(|bare| protected * 2 <= bare)
        }),
    }
}
