use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use pin_project_lite::pin_project;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::Instant,
};

use super::{scan::FirstHead, slot::ConnectionSlot, timer::LazyTimer};
use crate::limit::OwnedPermit;

pin_project! {
    /// A connection that occupies a slot of its listener until it is dropped.
    ///
    /// Before the first request head is complete, a read fails with [`TimedOut`](io::ErrorKind::TimedOut) after the
    /// [time limit](super::limited::LimitedListener::head_timeout) of the listener, or if the listener is full and
    /// reclaims the slot.
    #[derive(Debug)]
    pub struct Connection<Io = TcpStream> {
        #[pin]
        io: Io,
        permit: OwnedPermit,
        slot: ConnectionSlot,
        // `Some` until the first head is complete.
        head_wait: Option<HeadWait>,
    }
}

/// The wait for the first request head.
#[derive(Debug)]
struct HeadWait {
    head: FirstHead,
    accepted: Instant,
    timeout: Option<Duration>,
    timer: LazyTimer,
}

impl HeadWait {
    /// Fails if the time limit has passed or the slot is reclaimed. Otherwise each of these events wakes the task.
    fn check(&mut self, slot: &ConnectionSlot, cx: &mut Context<'_>) -> io::Result<()> {
        slot.wake_on_reclaim(cx.waker());
        if slot.is_reclaimed() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the listener needs the slot"));
        }
        // A deadline that the clock cannot represent never passes.
        if let Some(deadline) = self.timeout.and_then(|timeout| self.accepted.checked_add(timeout))
        {
            let now = Instant::now();
            if now >= deadline {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "no request head in time"));
            }
            self.timer.arm(deadline, now, cx);
        }
        Ok(())
    }
}

impl<Io> Connection<Io> {
    pub(crate) fn new(
        io: Io,
        permit: OwnedPermit,
        slot: ConnectionSlot,
        timeout: Option<Duration>,
    ) -> Self {
        let (head, timer) = (FirstHead::default(), LazyTimer::new());
        let head_wait = HeadWait { head, accepted: Instant::now(), timeout, timer };
        Self { io, permit, slot, head_wait: Some(head_wait) }
    }

    /// Returns the wrapped stream, for example to set its socket options.
    pub fn get_ref(&self) -> &Io {
        &self.io
    }

    #[cfg(feature = "serve")]
    pub(crate) fn slot(&self) -> &ConnectionSlot {
        &self.slot
    }

    /// Replaces the stream by one that wraps it, such as TLS, in the same slot.
    ///
    /// The time limit of the first head continues from the accept. It is not checked while `wrap` runs, because `wrap`
    /// reads from the stream directly: limit the time of the handshake in `wrap`.
    ///
    /// # Errors
    ///
    /// Returns the error of `wrap`. The slot is then free.
    pub async fn map<T, E, F>(self, wrap: impl FnOnce(Io) -> F) -> Result<Connection<T>, E>
    where
        F: Future<Output = Result<T, E>>,
    {
        let Self { io, permit, slot, head_wait } = self;
        Ok(Connection { io: wrap(io).await?, permit, slot, head_wait })
    }
}

impl<Io: AsyncRead> AsyncRead for Connection<Io> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.project();
        let before = buf.filled().len();
        let read = this.io.poll_read(cx, buf);
        if let Some(wait) = this.head_wait {
            match &read {
                Poll::Ready(Ok(())) => {
                    if wait.head.scan(&buf.filled()[before..]) {
                        *this.head_wait = None;
                        this.slot.set_busy();
                    }
                }
                Poll::Ready(Err(_)) => {}
                Poll::Pending => wait.check(this.slot, cx)?,
            }
        }
        read
    }
}

impl<Io: AsyncWrite> AsyncWrite for Connection<Io> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.project().io.poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().io.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().io.poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.project().io.poll_write_vectored(cx, bufs)
    }
}
