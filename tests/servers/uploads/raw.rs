//! A client over HTTP/1.1 that writes its whole request before it reads.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use axum::Router;
use buttress::listener::LimitedListener;
use tokio::{task::spawn_blocking, time::Instant};

use super::{
    UPLOAD,
    results::Results,
    servers::{REJECTS, Rejects, SERVED, Served, start},
};
use crate::support::alone;

/// The header of a client that uses its connection once.
const CLOSE: &str = "connection: close\r\n";
const MAX_WAIT: Duration = Duration::from_secs(10);

/// Opens a connection whose reads and writes end after [`MAX_WAIT`].
pub fn connect(addr: SocketAddr) -> TcpStream {
    let tcp = TcpStream::connect(addr).unwrap();
    tcp.set_read_timeout(Some(MAX_WAIT)).unwrap();
    tcp.set_write_timeout(Some(MAX_WAIT)).unwrap();
    tcp
}

/// Reads a response with a content length. Returns its status code.
pub fn read_response(tcp: &mut TcpStream) -> io::Result<u16> {
    let (mut read, mut buffer) = (Vec::new(), [0; 1024]);
    loop {
        match tcp.read(&mut buffer)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            more => read.extend_from_slice(&buffer[..more]),
        }
        let Some(end) = read.windows(4).position(|it| it == b"\r\n\r\n") else { continue };
        let head = String::from_utf8_lossy(&read[..end]).to_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        let length: usize = length.map_or(0, |length| length.parse().unwrap());
        if read.len() >= end + 4 + length {
            return Ok(head[9..12].parse().unwrap());
        }
    }
}

/// Writes a request of `size` bytes, then reads. As in most clients, an error of the write ends the request.
pub fn upload(addr: SocketAddr, size: usize, headers: &str) -> io::Result<u16> {
    let mut tcp = connect(addr);
    let head = format!("POST / HTTP/1.1\r\nhost: here\r\n{headers}content-length: {size}\r\n\r\n");
    tcp.write_all(head.as_bytes())?;
    tcp.write_all(&vec![0; size])?;
    read_response(&mut tcp)
}

/// Makes `count` uploads in sequence.
async fn uploads(what: String, addr: SocketAddr, count: usize, headers: &'static str) -> Results {
    let uploads = move || {
        let mut results = Results::default();
        for _ in 0..count {
            let began = Instant::now();
            let status = upload(addr, UPLOAD, headers).map_err(|error| format!("{error:?}"));
            results.add(&what, status, began.elapsed());
        }
        results
    };
    spawn_blocking(uploads).await.unwrap()
}

async fn all_arrive(served: Served) {
    let _alone = alone().await;
    let server = start(served, Rejects::LimitFull).await;
    let mut results = uploads("kept".to_owned(), server.addr, 100, "").await;
    results.extend(uploads("closed".to_owned(), server.addr, 100, CLOSE).await);
    results.assert_all_arrived(200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rejection_reaches_client_that_writes_before_it_reads_under_axum_serve() {
    all_arrive(Served::Axum).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rejection_reaches_client_that_writes_before_it_reads_under_lifecycle_serve() {
    all_arrive(Served::Lifecycle).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rejection_of_each_layer_reaches_client_that_writes_before_it_reads() {
    let _alone = alone().await;
    let mut results = Results::default();
    for rejects in REJECTS {
        for served in SERVED {
            let server = start(served, rejects).await;
            for headers in ["", CLOSE] {
                let what = format!("{rejects:?} under {served:?} {headers:?}");
                results.extend(uploads(what, server.addr, 5, headers).await);
            }
        }
    }
    results.assert_all_arrived(200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rejection_of_a_connection_reaches_client_that_writes_before_it_reads() {
    let _alone = alone().await;
    let listener = LimitedListener::bind(([127, 0, 0, 1], 0).into(), 128, 1).unwrap();
    let addr = listener.local_addr().unwrap();
    let _permit = listener.handle().try_acquire().unwrap();
    tokio::spawn(async move { axum::serve(listener, Router::new()).await });
    uploads("listener".to_owned(), addr, 50, "").await.assert_all_arrived(50);
}
