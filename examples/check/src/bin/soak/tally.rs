//! The results of the calls.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Mutex, PoisonError},
};

use http::StatusCode;

use crate::{untrusted::Kind, verdict::Verdict};

#[derive(Default)]
pub struct Tally(Mutex<BTreeMap<String, u64>>);

impl Tally {
    pub const HUNG: &str = "hung";
    pub const SERVED: &str = "visitor: served";
    pub const NOT_SERVED: &str = "visitor: not served";

    pub fn count(&self, what: &str) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match counts.get_mut(what) {
            Some(count) => *count += 1,
            None => drop(counts.insert(what.into(), 1)),
        }
    }

    pub fn end(&self, end: Result<StatusCode, &str>) {
        match end {
            Ok(status) => self.count(status.as_str()),
            Err(why) => self.count(&format!("error: {why}")),
        }
    }

    fn of(&self, what: &str) -> u64 {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counts.get(what).copied().unwrap_or_default()
    }

    pub fn judge(&self, verdict: &mut Verdict) {
        verdict.zero("calls that hung", self.of(Self::HUNG) as usize);
        verdict
            .zero("visitors of a gateway that were not served", self.of(Self::NOT_SERVED) as usize);
        verdict.happened(Self::SERVED, self.of(Self::SERVED));
        Kind::ALL.iter().for_each(|kind| verdict.happened(kind.as_str(), self.of(kind.as_str())));
        let ends = ["200", "503", "given up", "never polled", "polled once", "vandalised"];
        let errors = [
            "limit_reached",
            "queue_timeout",
            "circuit_open",
            "circuit_half_open",
            "circuit_forced_open",
            "timeout_head",
            "timeout_first_frame",
            "timeout_response_idle",
            "timeout_request_idle",
            "timeout_deadline",
            "connections_saturated",
            "other",
        ];
        ends.iter().for_each(|end| verdict.happened(end, self.of(end)));
        for error in errors.map(|error| format!("error: {error}")) {
            verdict.happened(&error, self.of(&error));
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        writeln!(f, "Results of {} calls:", counts.values().sum::<u64>())?;
        counts.iter().try_for_each(|(what, count)| writeln!(f, "{count:>10} {what}"))
    }
}
