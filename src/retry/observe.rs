//! The metrics of a retry layer.

use std::sync::{Arc, Weak};

use super::{handle::RetryHandle, settings::RetrySettings};
use crate::{
    attempt::GiveUpReason,
    observe::{
        Condition, Observe, Observed, Part, Severity, Value, Visit, VisitHistogram, metrics::*,
    },
    outcome::{LayerKind, Reason},
    sealed::Sealed,
};

impl Sealed for RetryHandle {}

impl Observe for RetryHandle {
    fn parts(&self) -> Vec<Part> {
        let state: Weak<RetrySettings> = Arc::downgrade(&self.0);
        vec![Part::new(LayerKind::Retry.as_str(), self.0.name.as_str(), state)]
    }
}

impl Observed for RetrySettings {
    fn observe(&self, to: &mut dyn Visit) {
        let (budget, counters) = (self.budget(), &self.counters);
        let reasons = Reason::ALL.iter().map(Reason::as_str);
        to.counts(&RETRY_ATTEMPTS, "reason", reasons.zip(counters.retries()));
        let give_ups = GiveUpReason::ALL.iter().zip(counters.give_ups());
        // A call that ended because it has a response has not failed.
        let declined = give_ups.filter(|(reason, _)| **reason != GiveUpReason::Responded);
        let declined = declined.map(|(reason, count)| (reason.as_str(), count));
        to.counts(&RETRY_DECLINED, "reason", declined);
        to.count(&RETRY_RECOVERIES, counters.recoveries());
        let [retries, delays] = counters.retried_calls();
        to.sample(&RETRY_CALL_RETRIES, &[], Value::Histogram(retries));
        to.sample(&RETRY_DELAY, &[], Value::Histogram(delays));
        if let Some(budget) = budget {
            to.number(&RETRY_BUDGET_REMAINING, budget.balance());
            to.number(&RETRY_BUDGET_LIMIT, budget.max_balance());
        }
    }

    fn condition(&self) -> Condition {
        let retries: u64 = self.counters.retries().iter().sum();
        let recoveries = self.counters.recoveries();
        let counted = |condition: Condition| {
            condition.count("retries", retries, None).count("recovered calls", recoveries, None)
        };
        let Some(budget) = self.budget() else {
            let sentence = "Retries are not limited by a budget.";
            return counted(Condition::new(Severity::Healthy, "", sentence));
        };
        let (balance, max_balance) = (budget.balance(), budget.max_balance());
        let balance_now = (balance * 10.0).floor() / 10.0;
        let condition = if balance < 1.0 {
            let sentence = format!(
                "The retry budget is used up: {balance_now} of {max_balance:.0} retries are left."
            );
            Condition::new(Severity::Strained, "used_up", sentence)
                .next("Successful calls refill the budget.")
        } else {
            let sentence =
                format!("{balance_now} of {max_balance:.0} retries are left in the budget.");
            Condition::new(Severity::Healthy, "", sentence)
        };
        counted(condition.number("retry budget", balance_now, Some(max_balance)))
    }

    fn visit_histograms(&self, to: &mut VisitHistogram<'_>) {
        self.counters.visit_histograms(to);
    }
}
