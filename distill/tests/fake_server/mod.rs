//! An HTTP server in this process that answers as it is told, for what a real one cannot be made to do.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(dead_code, reason = "not every test program uses all of it")]

use std::io::{BufRead, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::Value;

/// A request: `POST /path`, and its body.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) line: String,
    pub(crate) authorization: Option<String>,
    pub(crate) body: Value,
}

/// A status, a header line or none, and a body.
pub(crate) type Reply = (u16, &'static str, String);

/// What it has seen.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) requests: Mutex<Vec<Request>>,
    pub(crate) most_at_once: AtomicUsize,
    at_once: AtomicUsize,
}

/// Starts a server; its address, and what it sees.
pub(crate) fn start(reply: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> (String, Arc<Seen>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let seen = Arc::new(Seen::default());
    let (reply, shared) = (Arc::new(reply), seen.clone());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (reply, seen) = (reply.clone(), shared.clone());
            std::thread::spawn(move || serve(&stream.unwrap(), reply.as_ref(), &seen));
        }
    });
    (url, seen)
}

fn serve(stream: &TcpStream, reply: &(impl Fn(&Request) -> Reply + ?Sized), seen: &Seen) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    while let Some(request) = read(&mut reader) {
        let now = seen.at_once.fetch_add(1, Ordering::SeqCst) + 1;
        seen.most_at_once.fetch_max(now, Ordering::SeqCst);
        seen.requests.lock().unwrap().push(request.clone());
        let (status, header, body) = reply(&request);
        seen.at_once.fetch_sub(1, Ordering::SeqCst);
        let length = body.len();
        let head = format!("HTTP/1.1 {status} x\r\n{header}Content-Length: {length}\r\n\r\n");
        let mut stream = stream;
        if stream.write_all(format!("{head}{body}").as_bytes()).is_err() {
            return;
        }
    }
}

fn read(reader: &mut impl BufRead) -> Option<Request> {
    let mut line = String::new();
    if reader.read_line(&mut line).ok()? == 0 {
        return None;
    }
    let line = line.trim().trim_end_matches(" HTTP/1.1").to_owned();
    let (mut length, mut authorization) = (0, None);
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        let Some((name, value)) = header.trim().split_once(": ") else {
            break;
        };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.parse().unwrap(),
            "authorization" => authorization = Some(value.to_owned()),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    Some(Request {
        line,
        authorization,
        body,
    })
}
