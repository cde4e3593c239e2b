use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};

use super::Oops;

/// The result of one poll of a scripted body.
#[derive(Clone, Debug)]
pub enum Piece {
    Data(Bytes),
    Trailers(HeaderMap),
    Error,
    /// Pending without end.
    Stuck,
    Panic,
}

impl Piece {
    pub fn data(text: &'static str) -> Self {
        Self::Data(Bytes::from_static(text.as_bytes()))
    }
}

/// A body that plays a script. It reports its end and its exact size, unless [`untold`](Self::untold) disables this.
#[derive(Clone, Debug)]
pub struct ScriptBody {
    pieces: VecDeque<Piece>,
    tells: bool,
}

impl ScriptBody {
    pub fn new(pieces: impl IntoIterator<Item = Piece>) -> Self {
        Self { pieces: pieces.into_iter().collect(), tells: true }
    }

    /// Disables `is_end_stream` and the exact size hint.
    pub fn untold(mut self) -> Self {
        self.tells = false;
        self
    }
}

impl Body for ScriptBody {
    type Data = Bytes;
    type Error = Oops;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Oops>>> {
        Poll::Ready(match self.pieces.pop_front() {
            None => None,
            Some(Piece::Data(data)) => Some(Ok(Frame::data(data))),
            Some(Piece::Trailers(trailers)) => Some(Ok(Frame::trailers(trailers))),
            Some(Piece::Error) => Some(Err(Oops("body"))),
            Some(Piece::Panic) => panic!("scripted panic in a body"),
            Some(Piece::Stuck) => {
                self.pieces.push_front(Piece::Stuck);
                return Poll::Pending;
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        self.tells && self.pieces.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        let size = self.pieces.iter().try_fold(0, |sum, piece| match piece {
            Piece::Data(data) => Some(sum + data.len() as u64),
            Piece::Trailers(_) => Some(sum),
            _ => None,
        });
        match size {
            Some(size) if self.tells => SizeHint::with_exact(size),
            _ => SizeHint::default(),
        }
    }
}
