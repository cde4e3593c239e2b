use std::{error::Error, fmt};

use crate::attempt::Attempts;
use crate::{
    error::{BoxError, Chain},
    outcome::{Outcome, Reason, Rejected, RejectedKind, TimeoutPhase},
    redact::{self, Redacted},
};

/// The error of a call of a ready-made client, such as that of `buttress::client`.
///
/// It converts by `?` into `Box<dyn Error>`, [`BoxError`] and `anyhow::Error`. The [`source`](Error::source) is the
/// error of the stack itself, so [`Rejected::find`], [`Attempts::find`](crate::attempt::Attempts::find) and
/// [`Outcome::of_error`] work on this error and on everything it is converted into.
///
/// # Display
///
/// One line that states the kind, the number of attempts if there were several, and the reason:
/// `call failed after 3 attempts: reset`. `call rejected, nothing was sent: concurrency limit is reached` states that
/// the upstream has not received the call. `{:#}` appends the chain of sources, shortened to 512 bytes and without
/// [secrets](crate#secrets).
pub struct ClientError(BoxError);

/// The kind of a [`ClientError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ClientErrorKind {
    /// A layer rejected the call, for example because of an open circuit, a full limit, or no free connection. The last
    /// attempt sent nothing.
    Rejected,
    /// The deadline of the call passed.
    DeadlineExceeded,
    /// A phase of the last attempt took longer than its timeout.
    Timeout,
    /// No connection could be made. The last attempt sent nothing.
    Connect,
    /// The request cannot be sent as it is, or its body failed.
    Request,
    /// The exchange failed in another way, for example because the connection was reset.
    Transport,
}

impl ClientErrorKind {
    /// Returns the kind in `snake_case`, for the label of a metric.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Rejected => "rejected",
            Self::DeadlineExceeded => "deadline_exceeded",
            Self::Timeout => "timeout",
            Self::Connect => "connect",
            Self::Request => "request",
            Self::Transport => "transport",
        }
    }
}

impl fmt::Display for ClientErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl ClientError {
    pub(crate) fn new(error: BoxError) -> Self {
        Self(error)
    }

    /// Returns the kind.
    #[must_use]
    pub fn kind(&self) -> ClientErrorKind {
        if let Some(rejected) = self.rejected() {
            return match rejected.kind() {
                RejectedKind::DeadlinePassed | RejectedKind::TimedOut(TimeoutPhase::Deadline) => {
                    ClientErrorKind::DeadlineExceeded
                }
                RejectedKind::TimedOut(_) => ClientErrorKind::Timeout,
                _ => ClientErrorKind::Rejected,
            };
        }
        match self.reason() {
            Reason::ConnectRefused | Reason::ConnectTimeout | Reason::ConnectFailed => {
                ClientErrorKind::Connect
            }
            Reason::Timeout => ClientErrorKind::Timeout,
            Reason::Caller => ClientErrorKind::Request,
            _ => ClientErrorKind::Transport,
        }
    }

    /// Returns the rejection, if a layer rejected or timed out the call.
    #[must_use]
    pub fn rejected(&self) -> Option<&Rejected> {
        Rejected::find(&*self.0)
    }

    /// Returns the record of the attempts, if a retry gave up on the call.
    #[cfg_attr(docsrs, doc(cfg(feature = "retry")))]
    #[must_use]
    pub fn attempts(&self) -> Option<Attempts> {
        Attempts::find(&*self.0)
    }

    /// Returns the error of the stack itself, without this wrapper.
    #[must_use]
    pub fn into_inner(self) -> BoxError {
        self.0
    }

    fn reason(&self) -> Reason {
        Outcome::of_error(&*self.0).reason()
    }
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.kind() {
            ClientErrorKind::Rejected => "call rejected",
            ClientErrorKind::DeadlineExceeded => "deadline exceeded",
            ClientErrorKind::Timeout => "call timed out",
            ClientErrorKind::Request => "invalid request or failed request body",
            ClientErrorKind::Connect | ClientErrorKind::Transport => "call failed",
        })?;
        if let Some(Attempts { made, sent, .. }) = self.attempts() {
            if made > 1 {
                write!(f, " after {made} attempts")?;
            }
            if made > 0 && sent == 0 {
                f.write_str(", nothing was sent")?;
            }
        }
        match self.rejected() {
            Some(rejected) => write!(f, ": {}", rejected.kind().phrase())?,
            None => write!(f, ": {}", self.reason())?,
        }
        if f.alternate() {
            write!(f, ": {}", Chain(&*self.0).within(redact::MAX_ERROR))?;
        }
        Ok(())
    }
}

/// Shows the source without [secrets](crate#secrets).
impl fmt::Debug for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientError")
            .field("kind", &self.kind())
            .field("source", &Redacted(&self.0))
            .finish()
    }
}

impl Error for ClientError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&*self.0)
    }
}
