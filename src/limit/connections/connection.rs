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

use crate::{
    limit::HeldPlace,
    listener::{FirstHead, LazyTimer, Slot},
};

pin_project! {
    /// A connection that occupies a slot of its listener until it is dropped.
    ///
    /// Reads fail with [`TimedOut`](io::ErrorKind::TimedOut) if the first request head is not complete within the
    /// [time limit](super::LimitedListener::head_timeout) of the listener, or if the listener is full and needs the
    /// slot before that head is complete.
    #[derive(Debug)]
    pub struct Connection<Io = TcpStream> {
        #[pin]
        io: Io,
        place: HeldPlace,
        slot: Slot,
        // Until the first head is complete.
        first: Option<First>,
    }
}

/// The wait for the first request head.
#[derive(Debug)]
struct First {
    head: FirstHead,
    accepted: Instant,
    timeout: Option<Duration>,
    timer: LazyTimer,
}

impl First {
    /// Fails if the time is over or the slot is reclaimed. Otherwise one of both wakes the task.
    fn check(&mut self, slot: &Slot, cx: &mut Context<'_>) -> io::Result<()> {
        slot.wake_on_reclaim(cx.waker());
        if slot.is_reclaimed() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the listener needs the slot"));
        }
        // A timeout that the clock cannot represent is none.
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
    pub(super) fn new(io: Io, place: HeldPlace, slot: Slot, timeout: Option<Duration>) -> Self {
        let (head, timer) = (FirstHead::default(), LazyTimer::new());
        let first = First { head, accepted: Instant::now(), timeout, timer };
        Self { io, place, slot, first: Some(first) }
    }

    /// The connection itself, to set its options.
    pub fn get_ref(&self) -> &Io {
        &self.io
    }

    #[cfg(feature = "serve")]
    pub(crate) fn slot(&self) -> &Slot {
        &self.slot
    }

    /// The same slot under another stream, such as TLS over this one. The time limit of the first head continues, and
    /// includes the handshake only if `wrap` limits it: its reads are those of the wrapped stream.
    ///
    /// # Errors
    ///
    /// As `wrap` fails. The slot is free again.
    pub async fn map<T, E, F>(self, wrap: impl FnOnce(Io) -> F) -> Result<Connection<T>, E>
    where
        F: Future<Output = Result<T, E>>,
    {
        let Self { io, place, slot, first } = self;
        Ok(Connection { io: wrap(io).await?, place, slot, first })
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
        if let Some(first) = this.first {
            match &read {
                Poll::Ready(Ok(())) => {
                    if first.head.scan(&buf.filled()[before..]) {
                        *this.first = None;
                        this.slot.set_busy();
                    }
                }
                Poll::Ready(Err(_)) => {}
                Poll::Pending => first.check(this.slot, cx)?,
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
