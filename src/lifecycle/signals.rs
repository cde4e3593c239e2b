use std::{io, sync::Weak};

use super::state::LifecycleState;

/// The installed handlers of the signals that request the end of the process.
///
/// After [`install`](Self::install) these signals no longer terminate the process.
pub(super) struct Signals {
    #[cfg(unix)]
    terminate: tokio::signal::unix::Signal,
    #[cfg(unix)]
    interrupt: tokio::signal::unix::Signal,
    #[cfg(windows)]
    interrupt: tokio::signal::windows::CtrlC,
    #[cfg(windows)]
    close: tokio::signal::windows::CtrlClose,
}

impl Signals {
    #[cfg(unix)]
    pub(super) fn install() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    #[cfg(windows)]
    pub(super) fn install() -> io::Result<Self> {
        use tokio::signal::windows;
        Ok(Self { interrupt: windows::ctrl_c()?, close: windows::ctrl_close()? })
    }

    #[cfg(not(any(unix, windows)))]
    pub(super) fn install() -> io::Result<Self> {
        Err(io::ErrorKind::Unsupported.into())
    }

    #[cfg(unix)]
    async fn next(&mut self) -> Option<()> {
        tokio::select! {
            signal = self.terminate.recv() => signal,
            signal = self.interrupt.recv() => signal,
        }
    }

    #[cfg(windows)]
    async fn next(&mut self) -> Option<()> {
        tokio::select! {
            signal = self.interrupt.recv() => signal,
            signal = self.close.recv() => signal,
        }
    }

    #[cfg(not(any(unix, windows)))]
    async fn next(&mut self) -> Option<()> {
        None
    }

    /// Applies the signals to the state until the state is dropped. The first signal begins the drain, and each later
    /// signal calls [`LifecycleState::skip_delay`].
    pub(super) async fn apply_to(mut self, state: Weak<LifecycleState>) {
        let mut apply: fn(&LifecycleState) = LifecycleState::drain;
        while self.next().await.is_some() {
            let Some(state) = state.upgrade() else { return };
            apply(&state);
            apply = LifecycleState::skip_delay;
        }
    }
}
