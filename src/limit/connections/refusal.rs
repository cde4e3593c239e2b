//! Tells a connection that there is no room for it, in its own words.

use std::{io, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::timeout,
};

use crate::call::{Rejected, whole_seconds};

/// Nobody is talked to for longer.
const PATIENCE: Duration = Duration::from_secs(1);
/// A request that is still coming is read away up to here: closed before, the answer would be lost in a reset.
const MOST_READ: usize = 64 * 1024;

/// How HTTP/2 begins, as far as it tells it from HTTP/1's `PROPFIND`.
const HTTP2: &[u8] = b"PRI ";
/// How a TLS handshake begins.
const TLS: u8 = 22;

/// Empty settings, as HTTP/2 begins; then: going away, last stream looked at 0, no error.
const GO_AWAY: [u8; 26] = [
    0, 0, 0, 4, 0, 0, 0, 0, 0, //
    0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

pub(super) async fn tell<Io: AsyncRead + AsyncWrite + Unpin>(io: Io, refused: Rejected) {
    // Whoever cannot be told is closed all the same.
    let _ = timeout(PATIENCE, answer(io, &refused)).await;
}

async fn answer<Io>(mut io: Io, refused: &Rejected) -> io::Result<()>
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    let (mut head, mut read) = ([0; HTTP2.len()], 0);
    while read < head.len() {
        match io.read(&mut head[read..]).await? {
            0 => return Ok(()),
            more => read += more,
        }
        if head[0] == TLS {
            return Ok(());
        }
    }
    if head == HTTP2 {
        io.write_all(&GO_AWAY).await?;
    } else {
        let after = whole_seconds(refused.retry_after().unwrap_or_default());
        let text = format!(
            "HTTP/1.1 503 Service Unavailable\r\nretry-after: {after}\r\n\
             content-length: 0\r\nconnection: close\r\n\r\n"
        );
        io.write_all(text.as_bytes()).await?;
    }
    io.shutdown().await?;
    let (mut rest, mut buffer) = (MOST_READ, [0; 1024]);
    while rest > 0 {
        match io.read(&mut buffer).await? {
            0 => break,
            more => rest = rest.saturating_sub(more),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::{io::duplex, time::Instant};

    use super::*;
    use crate::call::RejectedKind;

    async fn told(says: &[u8]) -> (Vec<u8>, Duration) {
        let (mut client, server) = duplex(1024);
        let refused =
            Rejected::new(RejectedKind::Full).with_retry_after(Duration::from_millis(1500));
        let task = tokio::spawn(tell(server, refused));
        client.write_all(says).await.unwrap();
        let began = Instant::now();
        let mut heard = Vec::new();
        client.read_to_end(&mut heard).await.unwrap();
        let took = began.elapsed();
        drop(client);
        task.await.unwrap();
        (heard, took)
    }

    #[tokio::test(start_paused = true)]
    async fn limit_refuses_a_connection_in_its_own_words() {
        let (http1, _) = told(b"PROPFIND / HTTP/1.1\r\n\r\n").await;
        let http1 = String::from_utf8(http1).unwrap();
        assert!(
            http1.starts_with("HTTP/1.1 503 ") && http1.contains("retry-after: 2\r\n"),
            "{http1}"
        );
        let (http2, _) = told(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
        assert_eq!(http2, GO_AWAY);
        assert_eq!(told(&[22, 3, 1, 2, 0, 1]).await.0, b"");
    }

    #[tokio::test(start_paused = true)]
    async fn limit_does_not_talk_for_long_to_a_connection_it_refuses() {
        for says in [&b""[..], b"G", b"PRI"] {
            let (heard, took) = told(says).await;
            assert_eq!((heard, took), (vec![], PATIENCE));
        }
        // One that never stops talking.
        let (mut client, server) = duplex(16);
        let task = tokio::spawn(tell(server, Rejected::new(RejectedKind::Full)));
        let mut sent = 0;
        while client.write_all(b"GET / HTTP/1.1\r\n").await.is_ok() {
            sent += 16;
            // The answer has to fit somewhere.
            let _ = timeout(Duration::ZERO, client.read(&mut [0; 64])).await;
        }
        assert!(sent <= MOST_READ + 2048, "{sent}");
        task.await.unwrap();
    }
}
