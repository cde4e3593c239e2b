//! The I/O object of a connection, which hyper reads and writes.

use std::{
    fmt,
    future::Future,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use hyper::rt::{Read, ReadBuf, ReadBufCursor, Write};
use hyper_util::client::legacy::connect::{Connected, Connection};
use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, sleep_until};

use super::{
    conn::{Conn, ConnTag},
    hosts::ConnPermits,
    lifetime::{LifetimeVerdict, NEVER},
    state::ConnectState,
    streams::Lane,
};

pin_project! {
    /// A connection that holds its permits while it is open.
    ///
    /// If the connection is to be closed and is not in use, a read returns the end of the stream, as if the peer had
    /// closed it. hyper then closes the connection.
    pub struct Io<T> {
        #[pin]
        inner: T,
        // Declared after `inner`, so that the permits are released after the socket is closed.
        open: OpenConn,
    }
}

/// The state of the connection, the timer of its limits, and its permits.
struct OpenConn {
    conn: Arc<Conn>,
    has_written: bool,
    is_http2: bool,
    /// The frames of the peer, if this is an HTTP/2 connection of a [`Client`](super::client::Client).
    frames: Option<Box<PeerFrames>>,
    timer: Option<Pin<Box<Sleep>>>,
    _permits: ConnPermits,
}

impl Drop for OpenConn {
    fn drop(&mut self) {
        self.conn.close();
    }
}

impl<T> Io<T> {
    pub(super) fn new(
        inner: T,
        shared: &Arc<ConnectState>,
        permits: ConnPermits,
        lane: Option<Lane>,
    ) -> Self {
        let conn = ConnectState::open(shared, &permits.host_ref.streams, lane);
        let open = OpenConn {
            conn,
            has_written: false,
            is_http2: false,
            frames: None,
            timer: None,
            _permits: permits,
        };
        Self { inner, open }
    }

    /// Returns the wrapped connection.
    #[must_use]
    pub fn get_ref(&self) -> &T {
        &self.inner
    }
}

impl OpenConn {
    /// Returns `Ready` if the connection is to be closed now.
    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.conn.reports_uses() {
            return Poll::Pending;
        }
        // Register the waker before reading the state: the end of a use changes the state and then wakes the waker.
        self.conn.register_waker(cx.waker());
        // hyper reads before it writes. If an HTTP/1 connection ends here, hyper returns the request unsent, and
        // hyper-util sends it over another connection.
        if self.conn.is_stale() && !self.is_http2 {
            return Poll::Ready(());
        }
        if self.conn.close_reason().is_none() {
            if let Some(timer) = &mut self.timer {
                ready!(timer.as_mut().poll(cx));
            }
        }
        loop {
            match self.conn.verdict() {
                LifetimeVerdict::Close(_) => return Poll::Ready(()),
                LifetimeVerdict::Keep(NEVER) => return Poll::Pending,
                LifetimeVerdict::Keep(after) => {
                    ready!(self.set_timer(Duration::from_nanos(after)).poll(cx));
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
                self.frames = self.conn.reports_uses().then(Box::default);
            } else {
                Conn::set_http1(&self.conn);
            }
        }
        if self.conn.is_stale() {
            self.conn.serve_stale();
        }
    }

    fn set_timer(&mut self, time: Duration) -> Pin<&mut Sleep> {
        let at = Instant::now().checked_add(time).unwrap_or_else(Instant::now);
        match &mut self.timer {
            Some(timer) => {
                timer.as_mut().reset(at);
                timer.as_mut()
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
        let OpenConn { frames, conn, .. } = this.open;
        let read = match frames {
            None => this.inner.poll_read(cx, buf),
            Some(frames) => frames.read(this.inner, cx, buf, |change| match change {
                PeerChange::MaxStreams(max) => Conn::set_max_streams(conn, max),
                PeerChange::GoAway => conn.retire(),
            }),
        };
        if let Poll::Ready(read) = read {
            return Poll::Ready(read);
        }
        ready!(this.open.poll_close(cx));
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
        this.open.wrote(buf);
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
        this.open.wrote(bufs.iter().find(|buf| !buf.is_empty()).map_or(&[], |buf| buf));
        this.inner.poll_write_vectored(cx, bufs)
    }
}

impl<T: Connection> Connection for Io<T> {
    fn connected(&self) -> Connected {
        let connected = self.inner.connected();
        if !self.open.conn.reports_uses() {
            return connected;
        }
        connected.extra(ConnTag::new(self.open.conn.clone()))
    }
}

impl<T: fmt::Debug> fmt::Debug for Io<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Io").field("inner", &self.inner).finish_non_exhaustive()
    }
}

// ===== Announcements of the peer =====

/// Frame types and the ACK flag of RFC 9113 §6.
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const ACK: u8 = 1;

/// The frames of an HTTP/2 peer: reads the maximum number of streams from SETTINGS (RFC 9113 §6.5), and recognises
/// GOAWAY (§6.8). The other payloads are skipped.
struct PeerFrames {
    head: [u8; 9],
    /// The number of bytes of the head that have arrived.
    head_read: usize,
    /// The number of bytes of the payload that have not arrived.
    left: usize,
    setting: [u8; 6],
    setting_read: usize,
    max_streams: Option<usize>,
    has_settings: bool,
    /// The read buffer, because bytes in hyper's cursor cannot be read back. Sized for a DATA frame and a TLS record.
    buffer: [u8; 16 * 1024],
}

/// A change of an HTTP/2 connection that its peer announces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PeerChange {
    MaxStreams(usize),
    GoAway,
}

impl Default for PeerFrames {
    fn default() -> Self {
        Self {
            head: [0; 9],
            head_read: 0,
            left: 0,
            setting: [0; 6],
            setting_read: 0,
            max_streams: None,
            has_settings: false,
            buffer: [0; 16 * 1024],
        }
    }
}

impl PeerFrames {
    fn read<T: Read>(
        &mut self,
        inner: Pin<&mut T>,
        cx: &mut Context<'_>,
        mut buf: ReadBufCursor<'_>,
        mut report: impl FnMut(PeerChange),
    ) -> Poll<io::Result<()>> {
        let room = buf.remaining().min(self.buffer.len());
        let mut read = ReadBuf::new(&mut self.buffer[..room]);
        ready!(inner.poll_read(cx, read.unfilled()))?;
        let length = read.filled().len();
        buf.put_slice(read.filled());
        let mut start = 0;
        while start < length {
            let (used, change) = self.record(start, length);
            start += used;
            change.into_iter().for_each(&mut report);
        }
        Poll::Ready(Ok(()))
    }

    /// Records bytes of the buffer up to the end of a head or payload. Returns their number, and the change of a frame
    /// that is complete.
    fn record(&mut self, start: usize, end: usize) -> (usize, Option<PeerChange>) {
        let bytes = &self.buffer[start..end];
        let used = if self.head_read < self.head.len() {
            let head = &mut self.head[self.head_read..];
            let used = head.len().min(bytes.len());
            head[..used].copy_from_slice(&bytes[..used]);
            self.head_read += used;
            if self.head_read < self.head.len() {
                return (used, None);
            }
            let [a, b, c, ..] = self.head;
            self.left = u32::from_be_bytes([0, a, b, c]) as usize;
            (self.setting_read, self.max_streams) = (0, None);
            used
        } else {
            let used = self.left.min(bytes.len());
            self.left -= used;
            if self.head[3] == SETTINGS {
                for byte in &bytes[..used] {
                    self.setting[self.setting_read] = *byte;
                    self.setting_read += 1;
                    if self.setting_read == self.setting.len() {
                        self.setting_read = 0;
                        // MAX_CONCURRENT_STREAMS. The last value of a frame applies (§6.5.3).
                        if let [0, 3, a, b, c, d] = self.setting {
                            let max = u32::from_be_bytes([a, b, c, d]);
                            self.max_streams = Some(max as usize);
                        }
                    }
                }
            }
            used
        };
        if self.left > 0 {
            return (used, None);
        }
        self.head_read = 0;
        (used, self.end_frame())
    }

    fn end_frame(&mut self) -> Option<PeerChange> {
        match (self.head[3], self.head[4]) {
            (GOAWAY, _) => Some(PeerChange::GoAway),
            (SETTINGS, flags) if flags & ACK == 0 => {
                // Without a value the first SETTINGS set no limit, and later ones leave it (§6.5.2).
                let is_first = !std::mem::replace(&mut self.has_settings, true);
                let max = self.max_streams.or(is_first.then_some(usize::MAX))?;
                Some(PeerChange::MaxStreams(max))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u8::try_from(payload.len()).expect("short");
        [&[0, 0, length, kind, flags, 0, 0, 0, 0], payload].concat()
    }

    #[test]
    fn changes_are_read_from_frames_in_any_pieces() {
        let entry = |id: u8, value: u8| [0, id, 0, 0, 1, value];
        let max = |max| PeerChange::MaxStreams(max);
        let data = frame(0, 1, &[4; 60]);
        let first = frame(4, 0, &[entry(1, 0), entry(3, 5), entry(4, 9)].concat());
        let other = frame(4, 0, &entry(4, 9));
        let later = frame(4, 0, &[entry(3, 1), entry(3, 2)].concat());
        let (ack, goaway) = (frame(4, 1, &[]), frame(7, 0, &[0; 8]));
        let all = [&*first, &ack, &data, &other, &later, &data, &goaway, &data].concat();
        for (bytes, changes) in [
            (&all, &[max(0x105), max(0x102), PeerChange::GoAway][..]),
            (&other, &[max(usize::MAX)]),
            (&frame(4, 0, &[]), &[max(usize::MAX)]),
        ] {
            for piece in 1..=bytes.len() {
                let mut frames = PeerFrames::default();
                let mut seen = Vec::new();
                for piece in bytes.chunks(piece) {
                    frames.buffer[..piece.len()].copy_from_slice(piece);
                    let mut start = 0;
                    while start < piece.len() {
                        let (used, change) = frames.record(start, piece.len());
                        assert!(used > 0);
                        start += used;
                        seen.extend(change);
                    }
                }
                assert_eq!(seen, changes);
            }
        }
    }
}
