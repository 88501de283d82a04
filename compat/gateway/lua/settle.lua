-- Ends or changes leases.
-- ARGV: group, operation (ack, extend, release), ms, reason, deployment, then for each lease: id, count
-- Answer: {codes, expiry}; codes: ok, gone, stale, released, over, expiry
local group, operation, ms, reason, deployment = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]
local codes, limit = {}, 0
for i = 6, #ARGV, 2 do
  local id, count = ARGV[i], tonumber(ARGV[i + 1])
  local h = load(id)
  local code = 'ok'
  if not h or h.ahead == 2 or h.expires > 0 and h.expires <= now or deployment ~= '' and h.deployment ~= deployment then
    code = 'gone'
  elseif h.count ~= count then
    code = 'stale'
  else
    local deadline = redis.call('ZSCORE', leases, id)
    if not deadline then
      code = 'released'
    elseif tonumber(deadline) <= now then
      code = 'over'
    elseif operation == 'ack' then
      if h.ahead == 1 then
        h.ahead = 2
        redis.call('XACK', stream, group, id)
        redis.call('ZREM', leases, id)
        redis.call('ZREM', nexts, id)
        save(id, h)
      else
        forget(group, id)
      end
    elseif operation == 'release' then
      redis.call('ZREM', leases, id)
      redis.call('ZADD', nexts, math.max(now + ms, backoff(h)), id)
      if reason ~= '' then redis.call('HSET', why, id, number(h.count) .. ' ' .. number(now) .. ' ' .. reason) end
    elseif h.expires > 0 and now + ms > h.expires then
      code, limit = 'expiry', h.expires
    else
      redis.call('ZADD', leases, now + ms, id)
      redis.call('ZADD', nexts, math.max(now + ms, backoff(h)), id)
    end
  end
  codes[#codes + 1] = code
end
return { codes, number(limit) }
