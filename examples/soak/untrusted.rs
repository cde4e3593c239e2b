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
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::{sleep, timeout},
};

use crate::{clients::Body, gateway::DEADLINE_HEADER, tally::Tally};

/// The behaviour of an untrusted client.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    HangsUp,
    DeadlineHeader,
    GrpcTimeout,
    SlowUpload,
    SlowReader,
}

impl Kind {
    pub const ALL: [Self; 5] = [
        Self::HangsUp,
        Self::DeadlineHeader,
        Self::GrpcTimeout,
        Self::SlowUpload,
        Self::SlowReader,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::HangsUp => "untrusted: hung up",
            Self::DeadlineHeader => "untrusted: deadline by header",
            Self::GrpcTimeout => "untrusted: deadline by grpc-timeout",
            Self::SlowUpload => "untrusted: slow upload",
            Self::SlowReader => "untrusted: slow reader",
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
