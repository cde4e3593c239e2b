//! The condition of a layer in words: its state, the reason, and what happens next.

use std::{borrow::Cow, fmt, time::Duration};

/// The severity of a layer's condition.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Severity {
    /// The layer lets calls through.
    #[default]
    Healthy,
    /// The layer is at a limit, recovers, or rejects some calls.
    Strained,
    /// The layer rejects all calls, or at least half of the calls fail.
    Failing,
}

impl Severity {
    /// Returns `healthy`, `strained` or `failing`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Healthy => "healthy",
            Self::Strained => "strained",
            Self::Failing => "failing",
        }
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A number of a layer, with its maximum if it has one.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Fact {
    /// The name of the number, such as `in flight`.
    pub label: &'static str,
    /// The number.
    pub value: f64,
    /// The maximum of the number, such as a limit or a total.
    pub max: Option<f64>,
    /// The unit: `s` for seconds, otherwise empty.
    pub unit: &'static str,
}

/// Returns a number with the words that follow it: `1 call is`, `2 calls are`.
pub(crate) fn counted<N>(count: N, one: &str, many: &str) -> String
where
    N: fmt::Display + PartialEq + From<u8>,
{
    let words = if count == N::from(1) { one } else { many };
    format!("{count} {words}")
}

/// The condition of a layer at one time, without its history.
#[derive(Clone, Debug)]
pub(crate) struct Condition {
    pub(crate) severity: Severity,
    /// One word for the state. Empty if the layer has no states.
    pub(crate) state: &'static str,
    /// The state and its reason, in one or two sentences.
    pub(crate) sentence: String,
    pub(crate) reason: Option<&'static str>,
    /// The time after which this state ends without an action.
    pub(crate) ends_in: Option<Duration>,
    /// The next change of the state, or the action that ends it.
    pub(crate) next: Option<Cow<'static, str>>,
    /// A text that may contain the words of an upstream, such as the error of a health probe.
    pub(crate) detail: Option<String>,
    pub(crate) facts: Vec<Fact>,
    /// Whether the layer is a circuit that can be forced by hand.
    pub(crate) is_circuit: bool,
}

impl Condition {
    pub(crate) fn new(
        severity: Severity,
        state: &'static str,
        sentence: impl Into<String>,
    ) -> Self {
        let sentence = sentence.into();
        Self {
            severity,
            state,
            sentence,
            reason: None,
            ends_in: None,
            next: None,
            detail: None,
            facts: Vec::new(),
            is_circuit: false,
        }
    }

    pub(crate) fn reason(mut self, reason: Option<&'static str>) -> Self {
        self.reason = reason;
        self
    }

    pub(crate) fn ends_in(mut self, time: impl Into<Option<Duration>>) -> Self {
        self.ends_in = time.into();
        self
    }

    pub(crate) fn next(mut self, next: impl Into<Cow<'static, str>>) -> Self {
        self.next = Some(next.into());
        self
    }

    pub(crate) fn count(self, label: &'static str, count: u64, max: Option<u64>) -> Self {
        self.number(label, count as f64, max.map(|max| max as f64))
    }

    pub(crate) fn number(mut self, label: &'static str, value: f64, max: Option<f64>) -> Self {
        self.facts.push(Fact { label, value, max, unit: "" });
        self
    }

    pub(crate) fn seconds(mut self, label: &'static str, time: Duration) -> Self {
        self.facts.push(Fact { label, value: time.as_secs_f64(), max: None, unit: "s" });
        self
    }

    /// Adds the statement that the layer rejects no calls.
    pub(crate) fn in_shadow_mode(mut self, is_shadow: bool) -> Self {
        if is_shadow {
            self.sentence.push_str(" The layer is in shadow mode, so it rejects no calls.");
            self.severity = self.severity.min(Severity::Strained);
        }
        self
    }
}
