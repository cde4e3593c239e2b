use std::{borrow::Cow, error::Error, fmt, io, time::Duration};

/// Any error, boxed: what a client stack fails with.
pub type BoxError = Box<dyn Error + Send + Sync>;

/// The next error in a chain. What an `io::Error` was made of is not its source, but is looked at too.
pub(crate) fn next<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a (dyn Error + 'static)> {
    match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
        Some(made_of) => Some(made_of),
        None => error.source(),
    }
}

/// An error with all that it was caused by, on one line.
#[cfg(feature = "health")]
pub(crate) struct Chain<'a>(pub(crate) &'a (dyn Error + 'static));

#[cfg(feature = "health")]
impl Chain<'_> {
    /// So many bytes of it at most.
    pub(crate) fn within(&self, bytes: usize) -> String {
        let mut told = self.to_string();
        let ends = (0..=bytes.min(told.len())).rev().find(|end| told.is_char_boundary(*end));
        told.truncate(ends.unwrap_or_default());
        told
    }
}

#[cfg(feature = "health")]
impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut said = self.0.to_string();
        f.write_str(&said)?;
        let mut cause = next(self.0);
        for _ in 0..16 {
            let Some(error) = cause else { break };
            // What only wraps another says the same.
            let says = error.to_string();
            if says != said {
                write!(f, ": {says}")?;
            }
            (said, cause) = (says, next(error));
        }
        Ok(())
    }
}

/// A setting that cannot work: which one, what it was, and what would be right.
///
/// Setters never panic and never accept such a value in silence: a layer remembers the first one.
/// [`checked`](crate::CircuitBreakerLayer::checked) hands it out when the stack is built. A stack that
/// was built without asking refuses every call, with it as the [`Rejected`](crate::call::Rejected)'s
/// source; a retry or a hedge that cannot work lets calls through as they are, and a deadline goes
/// without that setting. All of them say so in the log, as an error.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConfigError {
    /// The setting, as the setter is called: `queue.max_wait`.
    pub field: &'static str,
    /// The value that was given.
    pub value: String,
    /// What would be right.
    pub remedy: Cow<'static, str>,
}

impl ConfigError {
    pub(crate) fn new(
        field: &'static str,
        value: impl fmt::Debug,
        remedy: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self { field, value: format!("{value:?}"), remedy: remedy.into() }
    }

    pub(crate) fn above_zero(field: &'static str, value: Duration) -> Result<Duration, Self> {
        if value.is_zero() {
            return Err(Self::new(field, value, "use a time above zero"));
        }
        Ok(value)
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` is {}: {}", self.field, self.value, self.remedy)
    }
}

impl Error for ConfigError {}

#[cfg(all(test, feature = "health"))]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::call::{Label, LayerKind, Rejected};

    #[test]
    fn a_chain_is_one_line_and_no_longer_than_it_may_be() {
        let twice = io::Error::other(io::Error::other("no route to host"));
        assert_eq!(Chain(&twice).within(99), "no route to host");
        let fault = ConfigError::new("limit", 0, "use 1 or more");
        let label = Label { name: Box::default(), fault: Some(fault) };
        let refused = Rejected::misconfigured(LayerKind::User, Arc::new(label));
        let told = "rejected by user: layer is misconfigured: `limit` is 0: use 1 or more";
        assert_eq!(Chain(&refused).within(99), told);
        let long = io::Error::other("ä".repeat(600));
        assert_eq!(Chain(&long).within(511), "ä".repeat(255));
    }
}
