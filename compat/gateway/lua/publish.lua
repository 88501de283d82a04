-- Publishes messages that have an idempotency key or a delay. Keys behind the common ones: the idempotency keys.
-- ARGV: for each message: index of its key in KEYS or 0, the key's life in ms, delay in ms, number of strings, the strings.
-- Answer: for each message {kind, id[, original]}; kinds: p plain, d delayed, x duplicate.
mature(100)
local answer = {}
local at = 1
while at <= #ARGV do
  local key, life, delay, n = tonumber(ARGV[at]), tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
  local pairs = {}
  for i = 1, n do pairs[i] = ARGV[at + 3 + i] end
  at = at + 4 + n
  local known = key > 0 and redis.call('GET', KEYS[key])
  if known then
    local own = redis.call('HINCRBY', placed, 'sequence', 1)
    answer[#answer + 1] = { 'x', number(own), known }
  else
    pairs[#pairs + 1] = 'tercet-expires'
    pairs[#pairs + 1] = number(now + life)
    local kind, id
    if delay > 0 then
      redis.call('XLEN', stream) -- refuses a key of another kind now: nobody could be told when the time has come
      kind, id = 'd', number(redis.call('HINCRBY', placed, 'sequence', 1))
      pairs[#pairs + 1] = 'tercet-id'
      pairs[#pairs + 1] = id
      pairs[#pairs + 1] = 'tercet-published'
      pairs[#pairs + 1] = number(now)
      redis.call('HSET', staged, id, cmsgpack.pack(pairs))
      redis.call('ZADD', delayed, now + delay, id)
    else
      kind, id = 'p', redis.call('XADD', stream, '*', unpack(pairs))
    end
    if key > 0 then redis.call('SET', KEYS[key], kind .. id, 'PX', life) end
    answer[#answer + 1] = { kind, id }
  end
end
return answer
