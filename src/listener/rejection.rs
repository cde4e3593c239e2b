//! Rejects a connection beyond the limit, in the protocol of the client.

use std::{io, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::timeout,
};

use super::scan::{PREFACE, TLS_HANDSHAKE};
use crate::{drain, outcome::Rejected, respond::whole_seconds};

/// The maximum time until the client has sent its first bytes and the response has been written.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(1);
/// Size in bytes of the buffer for data that the client sends after the response.
const BUFFER: usize = 16 * 1024;

/// The number of bytes of the HTTP/2 preface that distinguish it from `PROPFIND` of HTTP/1.
const MIN_PREFACE: usize = 4;

/// An empty SETTINGS frame, which begins a connection, and a GOAWAY frame with the last stream id 0 and NO_ERROR.
const GO_AWAY: [u8; 26] = [
    0, 0, 0, 4, 0, 0, 0, 0, 0, //
    0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

/// Sends a response, and then reads and discards what the client still sends, within the bounds of a [drain].
///
/// A connection that is closed before the client has sent everything is reset, and the client loses the response (RFC
/// 9112 §9.6). If the client does not send its first bytes or does not read the response in time, the connection is
/// closed without a drain.
pub(crate) async fn reject<Io: AsyncRead + AsyncWrite + Unpin>(mut io: Io, rejected: Rejected) {
    let responded = timeout(RESPONSE_TIMEOUT, respond(&mut io, &rejected)).await;
    if matches!(responded, Ok(Ok(true))) {
        let _ = timeout(drain::TIMEOUT, discard(io)).await;
    }
}

/// Reads and discards up to the end of the stream or the maximum number of bytes.
async fn discard(mut io: impl AsyncRead + Unpin) {
    let (mut left, mut buffer) = (drain::MAX_BYTES, vec![0; BUFFER]);
    while left > 0 {
        match io.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(more) => left = left.saturating_sub(more as u64),
        }
    }
}

/// Reads the first bytes of the client and responds in its protocol. Returns whether a response has been sent.
async fn respond<Io>(io: &mut Io, rejected: &Rejected) -> io::Result<bool>
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    let (mut head, mut read) = ([0; MIN_PREFACE], 0);
    while read < head.len() {
        match io.read(&mut head[read..]).await? {
            0 => return Ok(false),
            more => read += more,
        }
        if head[0] == TLS_HANDSHAKE {
            return Ok(false);
        }
    }
    if head == PREFACE[..MIN_PREFACE] {
        io.write_all(&GO_AWAY).await?;
    } else {
        let after = whole_seconds(rejected.retry_after().unwrap_or_default());
        let text = format!(
            "HTTP/1.1 503 Service Unavailable\r\nretry-after: {after}\r\ncache-control: no-store\r\n\
             content-length: 0\r\nconnection: close\r\n\r\n"
        );
        io.write_all(text.as_bytes()).await?;
    }
    io.shutdown().await?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use tokio::{io::duplex, time::Instant};

    use super::*;
    use crate::outcome::RejectedKind;

    async fn rejection(first_bytes: &[u8]) -> (Vec<u8>, Duration) {
        let (mut client, server) = duplex(1024);
        let rejected =
            Rejected::new(RejectedKind::Full).with_retry_after(Duration::from_millis(1500));
        let task = tokio::spawn(reject(server, rejected));
        client.write_all(first_bytes).await.unwrap();
        let began = Instant::now();
        let mut response = Vec::new();
        client.read_to_end(&mut response).await.unwrap();
        let took = began.elapsed();
        drop(client);
        task.await.unwrap();
        (response, took)
    }

    #[tokio::test(start_paused = true)]
    async fn connection_is_rejected_in_its_protocol() {
        let (http1, _) = rejection(b"PROPFIND / HTTP/1.1\r\n\r\n").await;
        let http1 = String::from_utf8(http1).unwrap();
        assert!(
            http1.starts_with("HTTP/1.1 503 ")
                && http1.contains("retry-after: 2\r\ncache-control: no-store\r\n"),
            "{http1}"
        );
        let (http2, _) = rejection(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
        assert_eq!(http2, GO_AWAY);
        assert_eq!(rejection(&[22, 3, 1, 2, 0, 1]).await.0, b"");
    }

    #[tokio::test(start_paused = true)]
    async fn time_and_bytes_of_a_rejection_are_bounded() {
        for first_bytes in [&b""[..], b"G", b"PRI"] {
            let (response, took) = rejection(first_bytes).await;
            assert_eq!((response, took), (vec![], RESPONSE_TIMEOUT));
        }
        // This client does not stop sending.
        const PIECE: usize = 64 * 1024;
        let (mut client, server) = duplex(PIECE);
        let task = tokio::spawn(reject(server, Rejected::new(RejectedKind::Full)));
        let (mut sent, piece) = (0, vec![b'G'; PIECE]);
        while client.write_all(&piece).await.is_ok() {
            sent += PIECE as u64;
        }
        assert!(sent > drain::MAX_BYTES / 2, "{sent}");
        assert!(sent <= drain::MAX_BYTES + 2 * PIECE as u64, "{sent}");
        task.await.unwrap();
    }
}
