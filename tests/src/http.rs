//! HTTP of the tests' own: a server of the files of a folder, with `Range`, and one question to another server.

use std::io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};

/// Serves a folder on 127.0.0.1 until the test's process ends.
#[derive(Debug)]
pub struct Server {
    port: u16,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Server {
    /// Starts one; every connection is cut off after `most` bytes of a body.
    ///
    /// # Errors
    /// When no port can be had.
    pub fn start(folder: &Path, most: u64) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = listener.local_addr()?.port();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (folder, log) = (folder.to_owned(), Arc::clone(&asked));
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (folder, log) = (folder.clone(), Arc::clone(&log));
                std::thread::spawn(move || answer(stream, &folder, most, &log).ok());
            }
        });
        Ok(Self { port, asked })
    }

    /// The address of a file.
    pub fn url(&self, file: &str) -> String {
        format!("http://127.0.0.1:{}/{file}", self.port)
    }

    /// `NAME FROM` of every request so far, in order.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn answer(stream: TcpStream, folder: &Path, most: u64, log: &Mutex<Vec<String>>) -> Result<()> {
    let mut reader = BufReader::new(stream);
    let (mut name, mut from) = (String::new(), 0);
    for line in reader.by_ref().lines() {
        let line = line?;
        if let Some(path) = line.strip_prefix("GET /") {
            name = path.split(' ').next().unwrap_or_default().to_owned();
        }
        if let Some(range) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
            from = range.trim_end_matches('-').parse()?;
        }
        if line.is_empty() {
            break;
        }
    }
    log.lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(format!("{name} {from}"));
    let mut stream = reader.into_inner();
    let Ok(mut file) = std::fs::File::open(folder.join(&name)) else {
        write!(
            stream,
            "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )?;
        return Ok(());
    };
    let length = file.metadata()?.len();
    let status = match from {
        0 => "200 OK\r\n".to_owned(),
        _ => format!(
            "206 Partial Content\r\nContent-Range: bytes {from}-{}/{length}\r\n",
            length - 1
        ),
    };
    write!(
        stream,
        "HTTP/1.1 {status}Content-Length: {}\r\nConnection: close\r\n\r\n",
        length - from
    )?;
    file.seek(SeekFrom::Start(from))?;
    std::io::copy(&mut file.take(most), &mut stream)?;
    Ok(())
}

/// Sends a body to `HOST:PORT` and returns the response's status and body. HTTP/1.0: it ends with the connection.
///
/// # Errors
/// When nobody listens there, or the response does not come within `limit`.
pub fn post(host: &str, path: &str, kind: &str, body: &[u8], limit: Duration) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect(host)?;
    stream.set_read_timeout(Some(limit))?;
    let length = body.len();
    write!(
        stream,
        "POST {path} HTTP/1.0\r\nHost: {host}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n"
    )?;
    stream.write_all(body)?;
    let mut response = String::new();
    stream.read_to_string(&mut response)?;
    let (head, body) = response.split_once("\r\n\r\n").context("no end of the headers")?;
    let status = head.split(' ').nth(1).context("no status")?.parse()?;
    Ok((status, body.to_owned()))
}
