//! The connection itself, as hyper reads and writes it.

use std::{
    fmt,
    future::Future,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::client::legacy::connect::{Connected, Connection};
use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, sleep_until};

use super::{
    conn::{Conn, Tag},
    core::Connections,
    host::Ticket,
    life::{NEVER, Verdict},
};
use crate::call::Shared;

pin_project! {
    /// A connection that holds its place for as long as it is open.
    ///
    /// To hyper one that is over, and not in use, looks as if its peer had closed it.
    pub struct Io<T> {
        #[pin]
        inner: T,
        // After `inner`: its place is free once it is closed.
        seat: Seat,
    }
}

struct Seat {
    conn: Shared<Conn>,
    has_written: bool,
    is_http2: bool,
    look: Option<Pin<Box<Sleep>>>,
    ticket: Ticket,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.conn.close();
    }
}

impl<T> Io<T> {
    pub(super) fn new(inner: T, all: &Shared<Connections>, ticket: Ticket, leased: bool) -> Self {
        let conn = Connections::open(all, &ticket.guest.host, leased);
        Self { inner, seat: Seat { conn, has_written: false, is_http2: false, look: None, ticket } }
    }

    /// What is wrapped.
    #[must_use]
    pub fn get_ref(&self) -> &T {
        &self.inner
    }
}

impl Seat {
    /// Ready once the connection is to be closed.
    fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.conn.is_leased() {
            return Poll::Pending;
        }
        // Before looking: who ends a use wakes who is known.
        self.conn.watch(cx.waker());
        // hyper reads before it writes, and gives a request back whole that finds an HTTP/1 connection closed.
        if self.conn.is_stale() && !self.is_http2 {
            return Poll::Ready(());
        }
        if self.conn.why_over().is_none() {
            if let Some(look) = &mut self.look {
                ready!(look.as_mut().poll(cx));
            }
        }
        loop {
            match self.conn.judge() {
                Verdict::Close(_) => return Poll::Ready(()),
                Verdict::Keep(NEVER) => return Poll::Pending,
                Verdict::Keep(after) => {
                    ready!(self.look_after(Duration::from_nanos(after)).poll(cx));
                }
            }
        }
    }

    /// Something has been written: what the connection was given to has begun.
    fn wrote(&mut self, bytes: &[u8]) {
        if !std::mem::replace(&mut self.has_written, true) {
            // The preface of a client (RFC 9113 §3.4).
            self.is_http2 = bytes.starts_with(b"PRI ");
            if self.is_http2 {
                self.ticket.guest.host.shares.tell();
            }
        }
        if self.conn.is_stale() {
            self.conn.keep_stale();
        }
    }

    fn look_after(&mut self, time: Duration) -> Pin<&mut Sleep> {
        let at = Instant::now().checked_add(time).unwrap_or_else(Instant::now);
        match &mut self.look {
            Some(look) => {
                look.as_mut().reset(at);
                look.as_mut()
            }
            none => none.insert(Box::pin(sleep_until(at))).as_mut(),
        }
    }
}

impl<T: Read> Read for Io<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.project();
        if let Poll::Ready(read) = this.inner.poll_read(cx, buf) {
            return Poll::Ready(read);
        }
        ready!(this.seat.poll_over(cx));
        // Nothing is read: the end.
        Poll::Ready(Ok(()))
    }
}

impl<T: Write> Write for Io<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.project();
        this.seat.wrote(buf);
        this.inner.poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().inner.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().inner.poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.project();
        this.seat.wrote(bufs.iter().find(|buf| !buf.is_empty()).map_or(&[], |buf| buf));
        this.inner.poll_write_vectored(cx, bufs)
    }
}

impl<T: Connection> Connection for Io<T> {
    fn connected(&self) -> Connected {
        let connected = self.inner.connected();
        if !self.seat.conn.is_leased() {
            return connected;
        }
        connected.extra(Tag::new(self.seat.conn.clone()))
    }
}

impl<T: fmt::Debug> fmt::Debug for Io<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Io").field("inner", &self.inner).finish_non_exhaustive()
    }
}
