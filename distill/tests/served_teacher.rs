//! A teacher behind a server: how vLLM is asked, what happens when a server fails, and a real llama-server beside the
//! same file in this process.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fake_server;
mod support;

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use fake_server::{Reply, Request, start};
use pipit_distill::data::Encoder;
use pipit_distill::teacher::gguf::GgufTeacher;
use pipit_distill::teacher::served::{Draw, Question, ServedOptions, ServedTeacher};
use pipit_distill::teacher::{Asked, Scores, Teacher, TopK};
use serde_json::{Map, Value, json};
use support::cached;

fn models(owner: &str) -> Reply {
    let models = json!({"object": "list", "data": [{"id": "other", "owned_by": owner},
        {"id": "big", "object": "model", "owned_by": owner, "max_model_len": 64}]});
    (200, "", models.to_string())
}

fn options(top_k: usize) -> ServedOptions {
    ServedOptions {
        top_k,
        vocab_size: 100,
        model: Some("big".into()),
        concurrency: 3,
        api_key: Some("secret".into()),
        ..ServedOptions::default()
    }
}

/// vLLM's answer: behind token t, token t + 1 is the most probable and the prompt's own has −t.
fn vllm(request: &Request) -> Reply {
    if request.line == "GET /v1/models" {
        return models("vllm");
    }
    assert_eq!(request.line, "POST /v1/completions");
    let ids: Vec<u64> = serde_json::from_value(request.body["prompt"].clone()).unwrap();
    let k = request.body["prompt_logprobs"].as_u64().unwrap();
    let mut places = vec![Value::Null];
    for pair in ids.windows(2) {
        let mut place = Map::new();
        for rank in 0..k {
            let token = pair[0] + 1 + rank;
            place.insert(
                token.to_string(),
                json!({"logprob": -0.5 - rank as f64, "rank": rank + 1, "decoded_token": "x"}),
            );
        }
        place
            .entry(pair[1].to_string())
            .or_insert(json!({"logprob": -(pair[0] as f64), "rank": 50, "decoded_token": "y"}));
        places.push(Value::Object(place));
    }
    // The server works on it for a while, so that several requests are there at once.
    std::thread::sleep(Duration::from_millis(30));
    (
        200,
        "",
        json!({"choices": [{"index": 0, "text": "z", "prompt_logprobs": places}]}).to_string(),
    )
}

const SEQUENCES: [(&[u32], &[i64]); 4] = [
    (&[10, 20, 30], &[-100, 20, 30]),
    (&[40, 41], &[-100, 41]),
    (&[50, 60, 61, 99], &[-100, -100, 61, 99]),
    (&[7, 8], &[7, -100]),
];

fn asked() -> Vec<Asked<'static>> {
    let asked = |(ids, labels): &(&'static [u32], &'static [i64])| Asked {
        ids,
        labels,
        route: None,
    };
    SEQUENCES.iter().map(asked).collect()
}

fn top(scores: Scores) -> TopK {
    match scores {
        Scores::Top(top) => top,
        _ => panic!("no top k"),
    }
}

#[test]
fn vllm_is_asked_for_the_prompts_own_tokens_in_parallel_and_answers_stay_in_order() {
    let (url, seen) = start(vllm);
    let mut teacher = ServedTeacher::connect(&format!("{url}/v1/"), options(2)).unwrap();
    assert_eq!(
        (teacher.name(), teacher.vocab_size()),
        (format!("big at {url}"), 100)
    );
    let scores = top(teacher.score(&asked()).unwrap());
    assert_eq!(scores.k, 2);
    assert_eq!(scores.ids, [11, 12, 21, 22, 41, 42, 61, 62, 62, 63]);
    assert_eq!(scores.logprobs[..4], [-0.5, -1.5, -0.5, -1.5]);
    let most = seen.most_at_once.load(Ordering::SeqCst);
    assert!((2..=3).contains(&most), "{most} requests at once");
    let requests = seen.requests.lock().unwrap();
    assert!(
        requests
            .iter()
            .all(|request| request.authorization.as_deref() == Some("Bearer secret"))
    );
    let body = &requests.last().unwrap().body;
    assert_eq!(
        (&body["model"], &body["max_tokens"], &body["temperature"]),
        (&json!("big"), &json!(1), &json!(1.0))
    );
    drop(requests);

    // With k = 0 the labels' own.
    let mut teacher = ServedTeacher::connect(&url, options(0)).unwrap();
    let Scores::Label(labels) = teacher.score(&asked()).unwrap() else {
        panic!("no labels")
    };
    assert_eq!(labels, [-10.0, -20.0, -40.0, -60.0, -61.0]);
    // A text that does not fit is refused before it is sent.
    let (ids, labels) = ([1; 64], [1; 64]);
    let long = Asked {
        ids: &ids,
        labels: &labels,
        route: None,
    };
    assert!(
        teacher
            .score(&[long])
            .err()
            .unwrap()
            .to_string()
            .contains("64 tokens")
    );
}

#[test]
fn what_may_pass_is_asked_again_and_what_may_not_is_not() {
    let count = AtomicUsize::new(0);
    let (url, seen) = start(move |request| match count.fetch_add(1, Ordering::SeqCst) {
        1 => (503, "Retry-After: 0\r\n", "{\"detail\": \"starting\"}".into()),
        2 => (200, "", "{\"choices\"".into()),
        _ => vllm(request),
    });
    let mut teacher = ServedTeacher::connect(&url, options(2)).unwrap();
    let one = &asked()[..1];
    // Half an answer is no reason to ask again: it is not what the server may say.
    let error = teacher.score(one).err().unwrap().to_string();
    assert!(error.contains("no JSON"), "{error}");
    assert_eq!(seen.requests.lock().unwrap().len(), 3);
    assert_eq!(top(teacher.score(one).unwrap()).ids, [11, 12, 21, 22]);

    let (url, seen) = start(|request| match request.line.as_str() {
        "GET /v1/models" => models("vllm"),
        _ => (
            400,
            "",
            json!({"error": {"message": "Requested prompt logprobs of 50, max allowed: 20"}}).to_string(),
        ),
    });
    let error = ServedTeacher::connect(&url, options(50))
        .unwrap()
        .score(one)
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains("answers 400") && error.contains("--max-logprobs"),
        "{error}"
    );
    assert_eq!(seen.requests.lock().unwrap().len(), 2);

    let (url, seen) = start(|_| (500, "Retry-After: 0\r\n", "out of memory\nand more".into()));
    let error = ServedTeacher::connect(&url, options(2))
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains("status 500: out of memory;") && error.contains("asked 5 times"),
        "{error}"
    );
    assert_eq!(seen.requests.lock().unwrap().len(), 5);
}

#[test]
fn other_servers_answer_but_do_not_score() {
    let (url, _) = start(|request| match request.line.as_str() {
        "GET /v1/models" => models("openai"),
        "POST /v1/chat/completions" if request.body["messages"][0]["content"] == "long" => {
            (400, "", json!({"error": {"message": "too long"}}).to_string())
        }
        "POST /v1/chat/completions" => {
            let text = format!(
                "{} {}",
                request.body["messages"][0]["content"], request.body["seed"]
            );
            let choice = json!({"message": {"role": "assistant", "content": text}, "finish_reason": "stop"});
            (200, "", json!({"choices": [choice]}).to_string())
        }
        _ => (
            200,
            "",
            json!({"choices": [{"text": "b", "finish_reason": "length"}]}).to_string(),
        ),
    });
    let mut teacher = ServedTeacher::connect(&url, options(2)).unwrap();
    let error = teacher.score(&asked()).err().unwrap().to_string();
    assert!(
        error.contains("\"openai\"") && error.contains("generate"),
        "{error}"
    );
    let (hello, long) = (
        [json!({"role": "user", "content": "hi"})],
        [json!({"role": "user", "content": "long"})],
    );
    let chat = |messages| Question::Chat {
        messages,
        tools: None,
    };
    let draw = Draw {
        temperature: 0.5,
        top_k: 0,
        top_p: 1.0,
        max_new_tokens: 4,
    };
    let answers = teacher
        .answers(
            &[(chat(&hello), 7), (Question::Text("a"), 8), (chat(&long), 9)],
            draw,
        )
        .unwrap();
    let first = answers[0].as_ref().unwrap();
    assert_eq!((first.text.as_str(), first.finished), ("\"hi\" 7", true));
    assert!(!answers[1].as_ref().unwrap().finished);
    assert!(answers[2].as_ref().unwrap_err().contains("too long"));
    assert_eq!(teacher.tokens("x").unwrap(), None);

    let unknown = ServedOptions {
        model: Some("small".into()),
        ..options(2)
    };
    let error = ServedTeacher::connect(&url, unknown).err().unwrap().to_string();
    assert!(
        error.contains("\"small\"") && error.contains("other, big"),
        "{error}"
    );
    for url in ["box:8000", "http://", "ftp://box"] {
        assert!(
            ServedTeacher::connect(url, options(2))
                .err()
                .unwrap()
                .to_string()
                .contains("no address"),
            "{url}"
        );
    }
}

/// A llama-server that ends with the test.
struct LlamaServer {
    process: Child,
    url: String,
}

impl LlamaServer {
    fn start(model: &PathBuf) -> Self {
        let cache = std::env::var_os("PIPIT_CACHE").map_or_else(
            || PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache/pipit"),
            PathBuf::from,
        );
        let tree = std::env::var_os("PIPIT_LLAMA_CPP").map_or_else(|| cache.join("llama.cpp"), PathBuf::from);
        let program = tree.join("build/bin/llama-server");
        assert!(
            program.is_file(),
            "{} is not there: scripts/fetch-llama-cpp builds it",
            program.display()
        );
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let process = Command::new(program)
            .arg("--model")
            .arg(model)
            .args([
                "--host",
                "127.0.0.1",
                "--port",
                &port.to_string(),
                "--parallel",
                "2",
                "--ctx-size",
                "1024",
            ])
            .args(["--threads", "1", "--no-webui"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self {
            process,
            url: format!("http://127.0.0.1:{port}"),
        }
    }

    /// Asks until it answers: a server that still loads says 503.
    fn teacher(&mut self, options: &ServedOptions) -> ServedTeacher {
        let since = Instant::now();
        loop {
            match ServedTeacher::connect(&self.url, options.clone()) {
                Ok(teacher) => return teacher,
                Err(error) => {
                    assert!(
                        self.process.try_wait().unwrap().is_none(),
                        "llama-server has ended: {error}"
                    );
                    assert!(since.elapsed() < Duration::from_secs(300), "{error}");
                }
            }
        }
    }
}

impl Drop for LlamaServer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
#[ignore = "needs llama-server, which scripts/fetch-llama-cpp builds; ./check --references runs it"]
fn a_real_llama_server_says_what_the_file_says_in_this_process() {
    let model = cached("PIPIT_TEST_MODEL", "SmolLM2-135M-Instruct.Q4_1.gguf");
    let encoder = Encoder::open(&model, 49_152).unwrap();
    let texts = [
        "<|im_start|>user\nTurn on the kitchen light.<|im_end|>\n<|im_start|>assistant\nThe light in the kitchen is on.<|im_end|>",
        "The capital of France is Paris, and zyzzyva is a weevil.<|im_end|>",
    ];
    let ids: Vec<Vec<u32>> = texts
        .iter()
        .map(|text| encoder.ids(text, false).unwrap())
        .collect();
    let labels: Vec<Vec<i64>> = ids
        .iter()
        .map(|ids| ids.iter().map(|id| i64::from(*id)).collect())
        .collect();
    let asked: Vec<Asked<'_>> = (0..2)
        .map(|i| Asked {
            ids: &ids[i],
            labels: &labels[i],
            route: None,
        })
        .collect();

    let Scores::Full(logits) = GgufTeacher::open(&model, 128).unwrap().score(&asked).unwrap() else {
        panic!("no logits")
    };
    let mut own = vec![0.0; logits.rows() * logits.vocab_size()];
    logits.read(0..logits.rows(), &mut own).unwrap();
    let own: Vec<Vec<f64>> = own.chunks_exact(logits.vocab_size()).map(log_softmax).collect();

    let mut server = LlamaServer::start(&model);
    let options = ServedOptions {
        top_k: 20,
        vocab_size: 49_152,
        concurrency: 2,
        attempts: 20,
        ..ServedOptions::default()
    };
    let mut teacher = server.teacher(&options);
    assert_eq!(teacher.tokens(texts[0]).unwrap().unwrap(), ids[0]);
    let began = Instant::now();
    let scores = top(teacher.score(&asked).unwrap());
    println!("{} tokens in {:.1} s", own.len(), began.elapsed().as_secs_f64());
    assert_eq!((scores.k, scores.ids.len()), (20, own.len() * 20));
    let mut apart: f64 = 0.0;
    for (row, own) in own.iter().enumerate() {
        for (id, logprob) in scores.ids[row * 20..][..20]
            .iter()
            .zip(&scores.logprobs[row * 20..])
        {
            apart = apart.max((own[*id as usize] - f64::from(*logprob)).abs());
        }
    }
    // Caches of f16 and batches of another shape round differently.
    assert!(apart < 0.02, "log p differ by {apart}");
    let Scores::Label(of_labels) = server
        .teacher(&ServedOptions { top_k: 0, ..options })
        .score(&asked)
        .unwrap()
    else {
        panic!("no labels")
    };
    let targets = ids.iter().flat_map(|ids| &ids[1..]);
    let worst = targets
        .zip(&own)
        .zip(&of_labels)
        .map(|((id, own), said)| (own[*id as usize] - f64::from(*said)).abs());
    let worst = worst.fold(0.0, f64::max);
    assert!(worst < 0.02, "log p of labels differ by {worst}");
    println!(
        "log p of the {} most probable tokens differ by {apart:.4} at most, of the labels by {worst:.4}",
        scores.k
    );

    let messages = [json!({"role": "user", "content": "What is the capital of France?"})];
    let draw = Draw {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        max_new_tokens: 24,
    };
    let answers = teacher
        .answers(
            &[(
                Question::Chat {
                    messages: &messages,
                    tools: None,
                },
                1,
            )],
            draw,
        )
        .unwrap();
    println!("{answers:?}");
    assert!(!answers[0].as_ref().unwrap().text.is_empty());
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from(x - max).exp()).sum();
    logits.iter().map(|x| f64::from(x - max) - sum.ln()).collect()
}
