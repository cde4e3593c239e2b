//! Reads a body within bounds. Every read that does not give the body to a caller uses [`poll_read`].

use std::{
    future::poll_fn,
    pin::{Pin, pin},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Buf;
use http_body::{Body, Frame};
use tokio::time::timeout;

/// The maximum number of bytes that are read of a response so that its connection can be reused.
pub(crate) const MAX_RESPONSE_BYTES: u64 = 64 * 1024;
/// The maximum duration of such a read. After it, the connection is given up.
pub(crate) const RESPONSE_TIMEOUT: Duration = Duration::from_millis(50);

/// The minimum number of bytes that a frame of a discarded response counts as, so that a body of empty or very small
/// frames reaches the maximum.
const MIN_DISCARDED_FRAME: u64 = 64;
/// The minimum number of bytes that any other frame counts as, so that a body of empty frames reaches the maximum.
pub(crate) const MIN_FRAME: u64 = 1;
/// The maximum number of frames that one poll reads.
const MAX_FRAMES_PER_POLL: u32 = 64;

/// The end of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReadEnd {
    /// The body has ended.
    End,
    /// The body has failed.
    Error,
    /// The body has more than the maximum of bytes.
    Exceeded,
}

/// Reads frames and hands them to `on_frame`, until the end of the body, an error, or a frame beyond `max_bytes`.
/// `read` is the number of bytes so far. A frame counts as at least `min_frame` bytes.
pub(crate) fn poll_read<B: Body>(
    mut body: Pin<&mut B>,
    read: &mut u64,
    (min_frame, max_bytes): (u64, u64),
    cx: &mut Context<'_>,
    mut on_frame: impl FnMut(Frame<B::Data>),
) -> Poll<ReadEnd> {
    for _ in 0..MAX_FRAMES_PER_POLL {
        if body.is_end_stream() {
            return Poll::Ready(ReadEnd::End);
        }
        let frame = match ready!(body.as_mut().poll_frame(cx)) {
            None => return Poll::Ready(ReadEnd::End),
            Some(Err(_)) => return Poll::Ready(ReadEnd::Error),
            Some(Ok(frame)) => frame,
        };
        let length = frame.data_ref().map_or(0, Buf::remaining) as u64;
        *read = read.saturating_add(length.max(min_frame));
        if *read > max_bytes {
            return Poll::Ready(ReadEnd::Exceeded);
        }
        let is_last = frame.is_trailers();
        on_frame(frame);
        if is_last {
            return Poll::Ready(ReadEnd::End);
        }
    }
    // Yield, so that the timer of the read and other tasks are polled.
    cx.waker().wake_by_ref();
    Poll::Pending
}

/// Drains the body of a response. Ready at its end, at an error, or if the body exceeds `max_bytes`. `read` is the
/// number of bytes so far.
///
/// A body whose known length exceeds the maximum is not polled, because its connection cannot be reused. With a maximum
/// of 0 no body is polled, not even for the end of a body of unknown length.
pub(crate) fn poll_drain<B: Body + Unpin>(
    body: &mut B,
    read: &mut u64,
    max_bytes: u64,
    cx: &mut Context<'_>,
) -> Poll<()> {
    if max_bytes == 0 || read.saturating_add(body.size_hint().lower()) > max_bytes {
        return Poll::Ready(());
    }
    poll_read(Pin::new(body), read, (MIN_DISCARDED_FRAME, max_bytes), cx, drop).map(drop)
}

/// Drains the body of a response within [`MAX_RESPONSE_BYTES`] and [`RESPONSE_TIMEOUT`].
pub(crate) async fn drain_response(body: impl Body) {
    let (mut body, mut read) = (pin!(body), 0);
    let bounds = (MIN_DISCARDED_FRAME, MAX_RESPONSE_BYTES);
    let end = poll_fn(|cx| poll_read(body.as_mut(), &mut read, bounds, cx, drop));
    let _ = timeout(RESPONSE_TIMEOUT, end).await;
}
