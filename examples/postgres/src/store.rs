//! The table: rows in, old rows out, rows of one client out.

use std::time::Duration;

use anyhow::Context as _;
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;

use crate::answer::Answer;

/// To get a connection, before the attempt counts as failed.
const PATIENCE: Duration = Duration::from_secs(5);

/// An open database, with its tables as this version has them.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    pool: PgPool,
}

impl Store {
    /// Connects and migrates.
    ///
    /// # Errors
    /// A server that is not there or refuses, a database of a later version.
    pub(crate) async fn open(url: &str) -> anyhow::Result<Self> {
        let pool = PgPoolOptions::new()
            .max_connections(2)
            .acquire_timeout(PATIENCE)
            .connect(url)
            .await
            .context("PostgreSQL does not let us in; hint: postgres://USER@HOST/DATABASE, the password in ~/.pgpass")?;
        sqlx::migrate!()
            .run(&pool)
            .await
            .context("the tables cannot be made or brought up to date")?;
        Ok(Self { pool })
    }

    /// Adds a row, unless the same answer is there.
    ///
    /// # Errors
    /// Those of the database.
    pub(crate) async fn add(&self, answer: &Answer) -> sqlx::Result<bool> {
        let query = sqlx::query(
            "insert into answers (client, reply_topic, request_id, answered_at, device, model, model_sha256, error, \
             finish_reason, prompt_tokens, cached_tokens, completion_tokens, queue_ms, prompt_ms, predicted_ms, energy_j) \
             values ($1, $2, $3, to_timestamp($4::double precision), $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16) \
             on conflict (reply_topic, request_id) do nothing",
        );
        let done = query
            .bind(&answer.client)
            .bind(&answer.reply_topic)
            .bind(&answer.request_id)
            .bind(answer.answered_at)
            .bind(&answer.device)
            .bind(&answer.model)
            .bind(&answer.model_sha256)
            .bind(&answer.error)
            .bind(&answer.finish_reason)
            .bind(answer.usage.prompt_tokens)
            .bind(answer.usage.prompt_tokens_details.cached_tokens)
            .bind(answer.usage.completion_tokens)
            .bind(answer.timings.queue_ms)
            .bind(answer.timings.prompt_ms)
            .bind(answer.timings.predicted_ms)
            .bind(answer.usage.energy_j)
            .execute(&self.pool)
            .await?;
        Ok(done.rows_affected() > 0)
    }

    /// Deletes what is older than so many days; how many rows.
    ///
    /// # Errors
    /// Those of the database.
    pub(crate) async fn prune(&self, days: f64) -> sqlx::Result<u64> {
        let query = sqlx::query("delete from answers where received_at < now() - make_interval(secs => $1)");
        Ok(query
            .bind(days * 86_400.0)
            .execute(&self.pool)
            .await?
            .rows_affected())
    }

    /// Deletes everything of one client, or below one reply topic; how many rows.
    ///
    /// # Errors
    /// Those of the database.
    pub(crate) async fn erase_client(&self, client: &str) -> sqlx::Result<u64> {
        let query = sqlx::query("delete from answers where client = $1 or reply_topic = $1");
        Ok(query.bind(client).execute(&self.pool).await?.rows_affected())
    }

    /// Deletes everything about one request; how many rows.
    ///
    /// # Errors
    /// Those of the database.
    pub(crate) async fn erase_request(&self, id: &str) -> sqlx::Result<u64> {
        let query = sqlx::query("delete from answers where request_id = $1");
        Ok(query.bind(id).execute(&self.pool).await?.rows_affected())
    }
}
