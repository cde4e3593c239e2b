//! Untrusted clients of a gateway, and visitors that it must serve at the same time.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use buttress::BoxError;
use fastrand::Rng;
use http::{Request, StatusCode};
use http_body_util::BodyExt;
use hyper_util::{
    client::legacy::Client,
    rt::{TokioExecutor, TokioTimer},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::{sleep, timeout},
};

use crate::{
    clients::Body,
    gateway::{DEADLINE_HEADER, KEY_HEADER},
    tally::Tally,
};

/// The behaviour of an untrusted client.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    HangsUp,
    DeadlineHeader,
    GrpcTimeout,
    SlowUpload,
    SlowReader,
    /// Connects and sends nothing.
    SilentSocket,
    /// Sends a part of a request head, or of the HTTP/2 preface.
    HalfHead,
    /// Sends a request body of one byte per 50 ms.
    TrickledBody,
    /// Does not read a large response.
    UnreadResponse,
    /// Does not read a large response over HTTP/2, and keeps the connection alive.
    UnreadStream,
    /// Sends a key that no other client has sent, often a large one.
    StrangeKey,
}

impl Kind {
    pub const ALL: [Self; 11] = [
        Self::HangsUp,
        Self::DeadlineHeader,
        Self::GrpcTimeout,
        Self::SlowUpload,
        Self::SlowReader,
        Self::SilentSocket,
        Self::HalfHead,
        Self::TrickledBody,
        Self::UnreadResponse,
        Self::UnreadStream,
        Self::StrangeKey,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::HangsUp => "untrusted: hung up",
            Self::DeadlineHeader => "untrusted: deadline by header",
            Self::GrpcTimeout => "untrusted: deadline by grpc-timeout",
            Self::SlowUpload => "untrusted: slow upload",
            Self::SlowReader => "untrusted: slow reader",
            Self::SilentSocket => "untrusted: silent socket",
            Self::HalfHead => "untrusted: half a head",
            Self::TrickledBody => "untrusted: trickled body",
            Self::UnreadResponse => "untrusted: unread response",
            Self::UnreadStream => "untrusted: unread HTTP/2 stream",
            Self::StrangeKey => "untrusted: strange key",
        }
    }
}

/// Maximum time of one exchange.
const MAX_TIME: Duration = Duration::from_secs(10);

pub async fn attack(
    kind: Kind,
    gateway: SocketAddr,
    mut random: Rng,
    tally: Arc<Tally>,
    over: Arc<AtomicBool>,
) {
    while !over.load(SeqCst) {
        match timeout(MAX_TIME, once(kind, gateway, &mut random)).await {
            Ok(Ok(())) => tally.count(kind.as_str()),
            Ok(Err(_)) => tally.count("untrusted: cut off"),
            Err(_) => tally.count(Tally::HUNG),
        }
        sleep(Duration::from_millis(random.u64(..20))).await;
    }
}

/// Makes one exchange. The upstream responds after 30 ms, later than all deadlines and hang-ups.
async fn once(kind: Kind, gateway: SocketAddr, random: &mut Rng) -> io::Result<()> {
    let ms = random.u64(1..25);
    match kind {
        Kind::HangsUp => {
            let _connection = send(gateway, "GET / HTTP/1.1\r\n", "").await?;
            sleep(Duration::from_millis(ms)).await;
            Ok(())
        }
        Kind::DeadlineHeader => {
            let header = format!("{DEADLINE_HEADER}: {ms}\r\n");
            read(send(gateway, "GET / HTTP/1.1\r\n", &header).await?).await
        }
        Kind::GrpcTimeout => {
            let headers = format!(
                "content-type: application/grpc\r\nte: trailers\r\ngrpc-timeout: {ms}m\r\ncontent-length: 0\r\n"
            );
            read(send(gateway, "POST /grpc HTTP/1.1\r\n", &headers).await?).await
        }
        Kind::SlowUpload => {
            let chunks = random.usize(5..20);
            let headers = format!("content-length: {}\r\n", 100 * chunks);
            let mut tcp = send(gateway, "POST /upload HTTP/1.1\r\n", &headers).await?;
            for _ in 0..chunks {
                sleep(Duration::from_millis(random.u64(20..100))).await;
                tcp.write_all(&[b'x'; 100]).await?;
            }
            read(tcp).await
        }
        Kind::SlowReader => {
            let mut tcp = send(gateway, "GET /large HTTP/1.1\r\n", "").await?;
            let mut buffer = [0; 4096];
            for _ in 0..random.u32(10..100) {
                if tcp.read(&mut buffer).await? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                sleep(Duration::from_millis(10)).await;
            }
            Ok(())
        }
        Kind::SilentSocket => until_closed(TcpStream::connect(gateway).await?).await,
        Kind::HalfHead => {
            let mut tcp = TcpStream::connect(gateway).await?;
            tcp.write_all(HALF_HEADS[random.usize(..HALF_HEADS.len())]).await?;
            until_closed(tcp).await
        }
        Kind::TrickledBody => {
            let tcp =
                send(gateway, "POST /upload HTTP/1.1\r\n", "content-length: 1000\r\n").await?;
            let (reader, mut writer) = tcp.into_split();
            let trickle = async {
                while writer.write_all(b"x").await.is_ok() {
                    sleep(Duration::from_millis(50)).await;
                }
                // The server has closed the connection.
                std::future::pending().await
            };
            tokio::select! {
                closed = until_closed(reader) => closed,
                () = trickle => Ok(()),
            }
        }
        Kind::UnreadResponse => {
            let tcp = send(gateway, "GET /large HTTP/1.1\r\n", "").await?;
            sleep(UNREAD_TIME).await;
            is_cut(tcp).await
        }
        Kind::UnreadStream => {
            let client = Client::builder(TokioExecutor::new())
                .http2_only(true)
                .http2_keep_alive_interval(Duration::from_millis(100))
                .timer(TokioTimer::new())
                .build_http::<Body>();
            let uri = format!("http://{gateway}/large");
            let request = Request::get(uri).body(Body::default()).map_err(io::Error::other)?;
            let response = client.request(request).await.map_err(io::Error::other)?;
            sleep(UNREAD_TIME).await;
            match response.into_body().collect().await {
                Ok(_) => Err(io::Error::other("the unread stream was not ended")),
                Err(_) => Ok(()),
            }
        }
        Kind::StrangeKey => {
            let length = if random.bool() { 16 } else { 4096 };
            let key: String = (0..length).map(|_| random.alphanumeric()).collect();
            let header = format!("{KEY_HEADER}: {key}\r\n");
            read(send(gateway, "GET / HTTP/1.1\r\n", &header).await?).await
        }
    }
}

const HALF_HEADS: [&[u8]; 5] = [
    b"P",
    b"PRI * HTTP/2.0\r\n\r\nS",
    b"GET / HTTP/1.1\r\nhost: gate",
    // The HTTP/2 preface without the SETTINGS frame that must follow.
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    // The HTTP/2 preface with that frame, and a header block that does not end.
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\0\0\x01\x01\0\0\0\0\x01\x82",
];

/// Time for which a client does not read its response. Longer than the time limits of the gateway.
const UNREAD_TIME: Duration = Duration::from_secs(6);

/// Reads until the server closes the connection.
async fn until_closed(mut reader: impl AsyncRead + Unpin) -> io::Result<()> {
    let mut buffer = [0; 1024];
    // A reset closes the connection, too.
    while reader.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
    Ok(())
}

/// Returns an error if the connection delivers the whole response.
async fn is_cut(mut tcp: TcpStream) -> io::Result<()> {
    let mut response = Vec::new();
    match tcp.read_to_end(&mut response).await {
        Ok(_) if response.ends_with(b"\r\n0\r\n\r\n") => {
            Err(io::Error::other("the unread response was not ended"))
        }
        _ => Ok(()),
    }
}

async fn send(gateway: SocketAddr, line: &str, headers: &str) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    // The kernel buffers this much of a response without waiting for the reader.
    socket.set_recv_buffer_size(16 * 1024)?;
    let mut tcp = socket.connect(gateway).await?;
    let head = format!("{line}host: gateway\r\nconnection: close\r\n{headers}\r\n");
    tcp.write_all(head.as_bytes()).await?;
    Ok(tcp)
}

/// Reads a response with any status to its end.
async fn read(mut tcp: TcpStream) -> io::Result<()> {
    let mut response = Vec::new();
    tcp.read_to_end(&mut response).await?;
    if response.starts_with(b"HTTP/1.1 ") {
        Ok(())
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

/// Calls the gateway repeatedly. The gateway must serve every call.
pub async fn visit(gateway: SocketAddr, tally: Arc<Tally>, over: Arc<AtomicBool>) {
    let client = Client::builder(TokioExecutor::new()).build_http::<Body>();
    while !over.load(SeqCst) {
        let visit = async {
            let request = Request::get(format!("http://{gateway}/")).body(Body::default())?;
            let response = client.request(request).await?;
            let status = response.status();
            response.into_body().collect().await?;
            Ok::<_, BoxError>(status)
        };
        match timeout(MAX_TIME, visit).await {
            Ok(Ok(StatusCode::OK)) => tally.count(Tally::SERVED),
            Ok(_) => tally.count(Tally::NOT_SERVED),
            Err(_) => tally.count(Tally::HUNG),
        }
        sleep(Duration::from_millis(10)).await;
    }
}
