//! The I/O object of a connection, which hyper reads and writes.

use std::{
    fmt,
    future::Future,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use hyper::rt::{Read, ReadBuf, ReadBufCursor, Write};
use hyper_util::client::legacy::connect::{Connected, Connection};
use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, sleep_until};

use super::{
    conn::{Conn, Tag},
    core::Connections,
    host::Ticket,
    life::{NEVER, Verdict},
    streams::Lane,
};
use crate::call::Shared;

pin_project! {
    /// A connection that holds its permits while it is open.
    ///
    /// If the connection is to be closed and is not in use, a read returns the end of the stream, as if the peer had
    /// closed it. hyper then closes the connection.
    pub struct Io<T> {
        #[pin]
        inner: T,
        // Declared after `inner`, so that the permits are released after the socket is closed.
        seat: Seat,
    }
}

/// The state of the connection, the timer of its limits, and its permits.
struct Seat {
    conn: Shared<Conn>,
    has_written: bool,
    is_http2: bool,
    /// Reads the SETTINGS of an HTTP/2 connection of a client, until they have arrived.
    settings: Option<PeerSettings>,
    /// Fires when the limits of the connection are to be checked again.
    look: Option<Pin<Box<Sleep>>>,
    _ticket: Ticket,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.conn.close();
    }
}

impl<T> Io<T> {
    pub(super) fn new(
        inner: T,
        all: &Shared<Connections>,
        ticket: Ticket,
        lane: Option<Lane>,
    ) -> Self {
        let conn = Connections::open(all, &ticket.guest.host, lane);
        let seat = Seat {
            conn,
            has_written: false,
            is_http2: false,
            settings: None,
            look: None,
            _ticket: ticket,
        };
        Self { inner, seat }
    }

    /// Returns the wrapped connection.
    #[must_use]
    pub fn get_ref(&self) -> &T {
        &self.inner
    }
}

impl Seat {
    /// Returns `Ready` if the connection is to be closed now.
    fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.conn.is_leased() {
            return Poll::Pending;
        }
        // Register the waker before reading the state: the end of a use changes the state and then wakes the waker.
        self.conn.watch(cx.waker());
        // hyper reads before it writes. If an HTTP/1 connection ends here, hyper returns the request unsent, and
        // hyper-util sends it over another connection.
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

    /// Records a write, which begins the request to which the connection was assigned.
    fn wrote(&mut self, bytes: &[u8]) {
        if !std::mem::replace(&mut self.has_written, true) {
            // The connection preface of HTTP/2 (RFC 9113 §3.4).
            self.is_http2 = bytes.starts_with(b"PRI ");
            if self.is_http2 {
                self.conn.set_http2();
                self.settings = self.conn.is_leased().then(PeerSettings::default);
            }
        }
        if self.conn.is_stale() {
            self.conn.keep_stale();
        }
    }

    /// Reads from the connection and passes the bytes to `PeerSettings`. The bytes go through a separate buffer,
    /// because a `ReadBufCursor` does not permit reading what was written to it.
    fn read_settings<T: Read>(
        &mut self,
        inner: Pin<&mut T>,
        cx: &mut Context<'_>,
        mut buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let mut bytes = [0; 1024];
        let room = buf.remaining().min(bytes.len());
        let mut read = ReadBuf::new(&mut bytes[..room]);
        ready!(inner.poll_read(cx, read.unfilled()))?;
        buf.put_slice(read.filled());
        let max = self.settings.as_mut().and_then(|settings| settings.record(read.filled()));
        if let Some(max) = max {
            self.settings = None;
            Conn::set_max_streams(&self.conn, max);
        }
        Poll::Ready(Ok(()))
    }

    /// Sets the timer of the next check.
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
        let read = match &this.seat.settings {
            None => this.inner.poll_read(cx, buf),
            Some(_) => this.seat.read_settings(this.inner, cx, buf),
        };
        if let Poll::Ready(read) = read {
            return Poll::Ready(read);
        }
        ready!(this.seat.poll_over(cx));
        // A read of no bytes is the end of the stream.
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

// ===== SETTINGS =====

/// Reads the maximum number of streams from the first frame of an HTTP/2 peer, which is SETTINGS (RFC 9113 §3.4, §6.5).
/// Later SETTINGS frames are not read.
#[derive(Default)]
struct PeerSettings {
    head: [u8; 9],
    entry: [u8; 6],
    read: usize,
    max_streams: Option<usize>,
}

impl PeerSettings {
    /// Reads the next bytes. Returns the maximum once the frame is complete. Without a value there is no limit (RFC
    /// 9113 §6.5.2).
    fn record(&mut self, bytes: &[u8]) -> Option<usize> {
        const SETTINGS: u8 = 4;
        const MAX_CONCURRENT_STREAMS: [u8; 2] = [0, 3];
        for byte in bytes {
            match self.read.checked_sub(self.head.len()) {
                None => self.head[self.read] = *byte,
                Some(at) => {
                    let at = at % self.entry.len();
                    self.entry[at] = *byte;
                    let [id @ .., a, b, c, d] = self.entry;
                    if at == self.entry.len() - 1 && id == MAX_CONCURRENT_STREAMS {
                        self.max_streams = usize::try_from(u32::from_be_bytes([a, b, c, d])).ok();
                    }
                }
            }
            self.read = self.read.saturating_add(1);
            let [a, b, c, kind, ..] = self.head;
            let end = u32::from_be_bytes([0, a, b, c]) as usize + self.head.len();
            // Any other first frame is a protocol error of the peer, which h2 reports.
            if self.read >= self.head.len() && (kind != SETTINGS || self.read >= end) {
                return Some(self.max_streams.unwrap_or(usize::MAX));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let length = u8::try_from(payload.len()).expect("short");
        [&[0, 0, length, kind, 0, 0, 0, 0, 0], payload].concat()
    }

    #[test]
    fn maximum_of_streams_is_read_from_the_first_frame_in_any_pieces() {
        let entry = |id: u8, value: u8| [0, id, 0, 0, 1, value];
        let some = frame(4, &[entry(1, 0), entry(3, 5), entry(4, 9)].concat());
        for (bytes, max) in [
            (&*some, 0x105),
            (&frame(4, &entry(4, 9)), usize::MAX),
            (&frame(4, &[]), usize::MAX),
            (&frame(7, &[0; 8])[..9], usize::MAX),
        ] {
            for piece in 1..=bytes.len() {
                let mut settings = PeerSettings::default();
                let read: Vec<_> =
                    bytes.chunks(piece).map(|piece| settings.record(piece)).collect();
                let (last, before) = read.split_last().expect("not empty");
                assert_eq!(*last, Some(max));
                assert!(before.iter().all(Option::is_none));
            }
        }
    }
}
