use std::{io, time::Duration};

use tokio::time::{Instant, sleep_until};

use crate::{
    event::{RepeatedEvent, event, prose},
    outcome::LayerKind,
    redact,
};

/// The pause of the accept loop after an error that is not specific to one connection, such as no free file
/// descriptors. axum and hyper use the same value.
const PAUSE: Duration = Duration::from_secs(1);

/// Handles the errors of `accept`, for every listener of the crate.
///
/// An error of one connection, which its client closed before the accept, is skipped. Any other error pauses the accept
/// loop for one second. The first such error is reported as a WARN event, and later ones at most once in 10 s.
#[derive(Debug)]
pub(crate) struct AcceptErrors {
    paused_until: Option<Instant>,
    failures: RepeatedEvent,
}

impl AcceptErrors {
    pub(crate) fn new() -> Self {
        Self { paused_until: None, failures: RepeatedEvent::new() }
    }

    /// Waits for the end of the pause, if there is one. The future can be dropped and the method called again.
    pub(crate) async fn pause(&mut self) {
        if let Some(until) = self.paused_until {
            sleep_until(until).await;
            self.paused_until = None;
        }
    }

    /// Records an error. If an event is due, returns the number of occurrences that it reports.
    fn record(&mut self, error: &io::Error) -> Option<u64> {
        if is_of_one_connection(error) {
            return None;
        }
        self.paused_until = Some(Instant::now() + PAUSE);
        self.failures.record()
    }

    /// Returns the accepted connection. Records an error, and emits a WARN event if one is due.
    pub(crate) fn check<T>(&mut self, accepted: io::Result<T>) -> Option<T> {
        let error = match accepted {
            Ok(connection) => return Some(connection),
            Err(error) => error,
        };
        if let Some(occurrences) = self.record(&error) {
            event!(
                listener,
                WARN,
                LayerKind::Listener.as_str(),
                "",
                why = prose(redact::Redacted(&error)),
                occurrences = occurrences,
                "cannot accept connections",
            );
        }
        None
    }
}

fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind as K;
    matches!(error.kind(), K::ConnectionRefused | K::ConnectionAborted | K::ConnectionReset)
}

#[cfg(all(test, feature = "tracing"))]
mod tests {
    use super::*;

    fn no_descriptors() -> io::Error {
        io::Error::other("too many open files")
    }

    #[tokio::test(start_paused = true)]
    async fn accept_errors_are_reported_once_in_ten_seconds_with_their_number() {
        let mut errors = AcceptErrors::new();
        let mut reports = Vec::new();
        let began = Instant::now();
        for _ in 0..25 {
            reports.extend(errors.record(&no_descriptors()));
            errors.pause().await;
        }
        assert_eq!(began.elapsed(), Duration::from_secs(25), "one second of pause after each");
        assert_eq!(reports, [1, 10, 10]);
    }

    #[tokio::test(start_paused = true)]
    async fn error_of_one_connection_causes_no_pause() {
        let mut errors = AcceptErrors::new();
        let began = Instant::now();
        for kind in [io::ErrorKind::ConnectionReset, io::ErrorKind::ConnectionAborted] {
            assert_eq!(errors.record(&kind.into()), None);
            errors.pause().await;
        }
        assert_eq!(began.elapsed(), Duration::ZERO);
    }
}
