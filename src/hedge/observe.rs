//! The metrics of a hedge layer.

use std::sync::{
    Arc, Weak,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use super::{
    handle::HedgeHandle,
    settings::{HedgeDeclineReason, HedgeSettings},
};
use crate::{
    observe::{Condition, Observe, Observed, Part, Severity, Visit, metrics::*},
    outcome::LayerKind,
    sealed::Sealed,
};

impl Sealed for HedgeHandle {}

impl Observe for HedgeHandle {
    fn parts(&self) -> Vec<Part> {
        let state: Weak<HedgeSettings> = Arc::downgrade(&self.0);
        vec![Part::new(LayerKind::Hedge.as_str(), self.0.name.as_str(), state)]
    }
}

/// The budget is not visited: a retry layer of the same stack has the same name, and may have another budget.
impl Observed for HedgeSettings {
    fn observe(&self, to: &mut dyn Visit) {
        let get = |count: &AtomicU64| count.load(Relaxed);
        to.count(&HEDGE_ATTEMPTS, get(&self.sent));
        to.count(&HEDGE_WINS, get(&self.won));
        let declined =
            HedgeDeclineReason::ALL.map(|reason| (reason.as_str(), self.declined(reason)));
        to.counts(&HEDGE_DECLINED, "reason", declined);
        // Absent while no hedge attempt is sent, for example before a percentile is known.
        if let Some(delay) = self.delay() {
            to.number(&HEDGE_DELAY, delay.as_secs_f64());
        }
    }

    fn condition(&self) -> Condition {
        let (sent, won) = (self.sent.load(Relaxed), self.won.load(Relaxed));
        let delay = self.delay();
        let sentence = match delay {
            Some(_) => format!("{won} of {sent} hedge attempts returned the response."),
            None => "No hedge attempt is sent now.".to_owned(),
        };
        let condition = Condition::new(Severity::Healthy, "", sentence)
            .count("hedge attempts", sent, None)
            .count("won", won, Some(sent).filter(|sent| *sent > 0));
        match delay {
            Some(delay) => condition.seconds("delay", delay),
            None => condition,
        }
    }
}
