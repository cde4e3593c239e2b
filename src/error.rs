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
#[cfg_attr(not(all(feature = "tracing", feature = "health")), allow(dead_code))] // Only events tell it.
pub(crate) struct Chain<'a>(pub(crate) &'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self.0, f)?;
        let mut cause = next(self.0);
        for _ in 0..16 {
            let Some(error) = cause else { break };
            write!(f, ": {error}")?;
            cause = next(error);
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
