-- One row for each final answer: who asked, who answered, with what, how much and how long. No words of anybody.
create table answers (
    id bigint generated always as identity primary key,
    received_at timestamptz not null default now(),
    -- The reply topic up to the first level below its prefix, as the devices have it: reply/kitchen.
    client text not null,
    reply_topic text not null,
    -- Plain text has none, unless its Correlation Data is one.
    request_id text,
    answered_at timestamptz,
    device text,
    model text,
    model_sha256 text,
    -- Null for an answer, else the code of the error.
    error text,
    finish_reason text,
    prompt_tokens bigint,
    cached_tokens bigint,
    completion_tokens bigint,
    queue_ms double precision,
    prompt_ms double precision,
    predicted_ms double precision
);

-- An answer is published at QoS 1 and may come twice.
create unique index answers_once on answers (reply_topic, request_id);
create index answers_by_client on answers (client, received_at);
create index answers_by_age on answers (received_at);
